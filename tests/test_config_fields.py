"""A field of a configuration that no code reads is a lie to whoever sets it."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"PlannerTraining", "Schedule", "Workload"}  # configurations by another name
Names = dict[str, set[str]]  # the configurations that a name may stand for


def parsed_files() -> dict[Path, ast.Module]:
    folders = [ROOT / name for name in ("cda4rec_jax", "kernels", "experiments")]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in sorted(folder.rglob("*.py"))}


def config_classes(files: Mapping[Path, ast.Module]) -> list[tuple[Path, ast.ClassDef]]:
    return [
        (path, node)
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and (node.name.endswith("Config") or node.name in SETTINGS)
    ]


def declared_names(tree: ast.Module, configs: set[str]) -> Names:
    """Names that a file gives the type of a config: parameters, fields, variables, and functions by what they return."""
    found: Names = defaultdict(set)
    for node in ast.walk(tree):
        name, annotation = "", None
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign):
            name, annotation = last_name(node.target), node.annotation
        elif isinstance(node, ast.FunctionDef):
            name, annotation = node.name, node.returns
        if annotation is not None:
            found[name] |= set(re.findall(r"\w+", ast.unparse(annotation))) & configs
    return {name: types for name, types in found.items() if types}


def last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``, ``c(...)``, ``replace(c, ...)`` and ``c or ...``."""
    match node:
        case ast.Call(func=ast.Name(id="replace") | ast.Attribute(attr="replace"), args=[first, *_]):
            return last_name(first)
        case ast.Call(func=inner) | ast.BoolOp(values=[inner, *_]):
            return last_name(inner)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def assignments(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The last names of both sides of every assignment, of tuples one by one."""
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            assert isinstance(node, ast.Assign)
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(map(last_name, target.elts), map(last_name, node.value.elts), strict=False)
            else:
                yield last_name(target), last_name(node.value)


def unread_fields(files: Mapping[Path, ast.Module]) -> list[str]:
    """Fields that are read through no name that may stand for their config. In doubt (an untyped ``config``) they count as read."""
    classes = {node.name: (path, node) for path, node in config_classes(files)}
    declared = {path: declared_names(tree, set(classes)) for path, tree in files.items()}
    everywhere: Names = defaultdict(set)
    for names in declared.values():
        for name, types in names.items():
            everywhere[name] |= types
    read: Names = defaultdict(set)
    for path, tree in files.items():
        names = {**everywhere, **{name: {name} for name in classes}, **declared[path]}
        for _ in range(3):  # an alias of an alias of an alias
            for target, value in assignments(tree):
                if target and value in names and target not in declared[path]:
                    names[target] = names.get(target, set()) | names[value]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                for name in names.get(last_name(node.value), ()):
                    read[name].add(node.attr)
    for name, (_, node) in classes.items():
        inside = [child for child in ast.walk(node) if isinstance(child, ast.Attribute)]
        read[name] |= {child.attr for child in inside if last_name(child.value) == "self"}

    def ancestors(name: str) -> set[str]:
        bases = [last_name(base) for base in classes[name][1].bases]
        return {name}.union(*(ancestors(base) for base in bases if base in classes))

    return [
        f"{path}:{field.lineno}: {name}.{field.target.id} is read nowhere"
        for name, (path, node) in classes.items()
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if not any(field.target.id in read[other] for other in classes if name in ancestors(other) or other in ancestors(name))
    ]


def test_every_field_of_a_config_is_read_by_some_code() -> None:
    unread = unread_fields(parsed_files())
    assert not unread, "\n".join(unread)


def test_a_field_is_not_read_by_code_that_reads_another_of_its_name() -> None:
    source = """
class OneConfig:
    items: int
    steps: int
    rate: float
    share: float
class OtherConfig(OneConfig):
    share: float
def run(one: OneConfig, batch: Batch, other: "OtherConfig | None"):
    settings = replace(one, steps=3)
    return batch.items + settings.rate + other.share
"""
    assert unread_fields({Path("made.py"): ast.parse(source)}) == [
        "made.py:3: OneConfig.items is read nowhere",
        "made.py:4: OneConfig.steps is read nowhere",
    ]


def test_every_config_is_a_frozen_keyword_only_dataclass() -> None:
    configs = config_classes(parsed_files())
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
