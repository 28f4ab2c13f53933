"""Readers of dataset folders: each tells whether a folder is its own, and reads it."""
