"""A field of a configuration that no code reads is a lie to whoever sets it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parsed_files() -> dict[Path, ast.Module]:
    folders = [ROOT / name for name in ("cda4rec_jax", "kernels", "experiments")]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in sorted(folder.rglob("*.py"))}


def config_classes() -> list[tuple[Path, ast.ClassDef]]:
    return [
        (path, node)
        for path, tree in parsed_files().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]


def test_every_field_of_a_config_is_read_by_some_code() -> None:
    nodes = [node for tree in parsed_files().values() for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    unread = [
        f"{path}:{field.lineno}: {config.name}.{field.target.id} is read nowhere"
        for path, config in config_classes()
        for field in config.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id not in read
    ]
    assert not unread, "\n".join(unread)


def test_every_config_is_a_frozen_keyword_only_dataclass() -> None:
    configs = config_classes()
    assert len(configs) >= 5, "the test looks in the wrong place"
    loose = [
        f"{path}:{config.lineno}: {config.name} is not @dataclass(frozen=True, kw_only=True)"
        for path, config in configs
        if not any(
            isinstance(decorator, ast.Call)
            and {"frozen=True", "kw_only=True"} <= {ast.unparse(key) for key in decorator.keywords}
            for decorator in config.decorator_list
        )
    ]
    assert not loose, "\n".join(loose)
