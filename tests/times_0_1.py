"""Measured times as version 0.1 stored them."""

TIMES_0_1 = {
    "planning_ms": 1.0,
    "abstract_ms": 2.0,
    "semantic_ms": {"profile": 10.0, "recent": 20.0, "full": 40.0},
    "retrieval_ms": {"20": 3.0, "100": 4.0, "500": 5.0},
    "cache_retrieval_ms": 6.0,
    "structured_ms": 200.0,
    "ranking_ms": {"20": 7.0, "100": 8.0, "500": 9.0},
    "ranking_cloud_ms": 11.0,
}
