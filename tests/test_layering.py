"""A module imports lower layers only; siblings on one row do not import each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("errors", "array_typing", "allocator", "processor"),
    ("timing", "draws", "user_cache"),
    ("messages",),
    ("kernels",),
    ("nn",),
    ("data", "agents.cloud", "agents.device", "retrieval", "planner", "privacy", "links", "metrics"),
    ("pipeline",),
    ("runs",),
    ("training", "evaluation", "runtime"),
    ("baselines",),
    ("presets",),
    ("bench",),
    ("",),  # the package's own table of contents
    ("cli",),
    ("experiments",),
)
ROW_OF = {unit: row for row, units in enumerate(ROWS) for unit in units}


def unit_of(module: str) -> str:
    """The layer of a dotted module: ``cda4rec_jax.agents.cloud.config`` -> ``agents.cloud``; an unknown one stays as it is."""
    parts = module.removeprefix("cda4rec_jax").removeprefix(".").split(".")
    return next((unit for n in (2, 1) if (unit := ".".join(parts[:n])) in ROW_OF), ".".join(parts))


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "cda4rec_jax" if node.level else node.module or ""  # a relative import counts as one of the whole package
        names = [f"{module}.{alias.name}" for alias in node.names]
        return [name if module in ("cda4rec_jax", "cda4rec_jax.agents") and unit_of(name) in ROW_OF else module for name in names]
    return []


def violations(path: Path, module: str) -> list[str]:
    """Every import in the file that the order of the layers forbids, as ``file:line: message``."""
    found, unit = [], unit_of(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported_modules(node):
            other = unit_of(name)
            if name.split(".")[0] != "cda4rec_jax" or other == unit:
                continue
            if ROW_OF.get(other, len(ROWS)) >= ROW_OF.get(unit, -1):
                line = getattr(node, "lineno", 0)
                found.append(f"{path}:{line}: {unit or 'cda4rec_jax'} may not import {other or 'cda4rec_jax'}")
    return found


def source_files() -> dict[Path, str]:
    """Every Python file that has a layer, with its dotted module name."""
    files = {}
    for folder, prefix in (("cda4rec_jax", ""), ("kernels", "cda4rec_jax."), ("experiments", "cda4rec_jax.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "cda4rec_jax" / "kernels"):  # a symlink: seen as kernels/
                files[path] = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return files


def test_modules_import_only_lower_layers() -> None:
    files = source_files()
    assert len(files) >= 40, f"saw only {len(files)} files below {ROOT}: the test looks in the wrong place"
    problems = [problem for path, module in files.items() for problem in violations(path, module)]
    assert not problems, "\n".join(problems)


def test_a_wrong_import_is_named_with_file_and_line(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    source.write_text(
        "import jax\nfrom cda4rec_jax.nn.mlp import Mlp\nfrom cda4rec_jax.privacy import gate\nfrom cda4rec_jax import cli\n"
    )
    assert violations(source, "cda4rec_jax.links.profiles") == [
        f"{source}:3: links may not import privacy",
        f"{source}:4: links may not import cli",
    ]
