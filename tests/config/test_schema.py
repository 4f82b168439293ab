"""The schema: every field explains itself, and none is decoration: the code that does the work reads it."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmkit
from llmkit.config.nodes import NODES, types_of_node, walk_schema
from llmkit.config.schema import TrainConfig

PACKAGE = Path(llmkit.__file__).parent
# A source of `data.datasets` has the fields of `data`, which is one itself.
TYPES = [kind for node in NODES for kind in types_of_node(node)]
CLASSES = {kind.__name__: kind for kind in (*TYPES, TrainConfig)} | {"SourceConfig": NODES["data"]}
KEYS = dict(walk_schema())

# An option's own name chooses the file; `user_file.file_overrides` reads all of them alike when a run is repeated
# (test_run_config.py), so an attribute of each need not be read.
NAMES_OF_OPTIONS = {f"{group}.name" for group in NODES} - {"method.name", "precision.name", "tracking.name"}
# What a card can do is there to be checked, on the driver, before a job waits in a queue for a card that cannot.
CHECKED_ONLY = {"hardware.precisions"}


@pytest.mark.parametrize("key", KEYS)
def test_every_field_says_in_one_sentence_what_it_is(key):
    doc = KEYS[key].metadata["doc"]

    assert doc.endswith((".", "..."))
    assert doc[0].isupper() or doc[0] in "`4"
    assert "\n" not in doc


def test_every_default_lies_in_its_own_range():
    from llmkit.config.setting import is_legal

    for key, info in KEYS.items():
        default = info.default if info.default is not dataclasses.MISSING else info.default_factory()
        assert is_legal(info, default), key


def test_every_field_is_read_by_the_code_that_does_the_work():
    """Reads are told apart by type: `config.lora.r` or `settings.r` with `settings: LoraConfig`, never just any `.r`.

    `llmkit/config` does not count: a field that is only checked and copied changes nothing.
    """
    trees = []
    for folder in (PACKAGE, PACKAGE / "recipes", PACKAGE / "launchers"):  # links, which rglob does not follow
        for file in set(folder.rglob("*.py")) - set((PACKAGE / "config").iterdir()):
            trees.append(ast.parse(file.read_text(encoding="utf-8")))
    holders: dict[str, type] = {}
    for tree in trees:
        holders |= held(tree)
    read = {key for tree in trees for key in reads(tree, holders)}

    assert sorted(KEYS.keys() - read - NAMES_OF_OPTIONS - CHECKED_ONLY) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(config: TrainConfig): return config.lora.r", {"lora.r"}),
        ("def f(settings: LoraConfig): return settings.r", {"lora.r"}),
        ("def f(config):\n slurm: SlurmLauncherConfig = config.launcher\n return slurm.qos", {"launcher.qos"}),
        ("def f(q: QloraConfig | None): return q.bits", {"qlora.bits"}),
        ("class C:\n def f(self): return self.config.training.optim", {"training.optim"}),
        ("def f(config: TrainConfig):\n a, b = config.data, config.seed\n return a.limit", {"data.limit", "seed"}),
        ("def f(config: TrainConfig):\n for k in ('env',): getattr(config.hardware, k)", {"hardware.env"}),
        ("def f(run_dir):\n config = load(run_dir)\n return config.name", {"name"}),
        ("class P:\n serve: ServeConfig\n def f(self): return self.serve.port", {"serve.port"}),
        ("class P:\n serve: ServeConfig\ndef f(p):\n s = p.serve\n return s.port", {"serve.port"}),
        ("def f(p): return p.serve.port", set()),
        ("def f(other): return other.r", set()),
        ("def f(config: TrainConfig): config.lora.r = 4", set()),
        ("def f(): return 'lora.r'", set()),
    ],
)
def test_a_read_is_recognized_by_the_type_of_what_it_is_read_from(code, expected):
    assert set(reads(ast.parse(code))) == expected


def reads(tree: ast.Module, holders: dict[str, type] | None = None) -> Iterator[str]:
    """The dotted keys of the schema that the code of a module reads.

    Args:
        holders: attributes of classes elsewhere that hold a node, by their names.
    """
    holders = held(tree) | (holders or {})
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.Module):
            yield from _reads_in(function, holders)


def held(tree: ast.Module) -> dict[str, type]:
    """The attributes that classes of a module declare to hold a node of the schema: name -> its dataclass."""
    found = {}
    for owner in ast.walk(tree):
        for line in owner.body if isinstance(owner, ast.ClassDef) else ():
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.annotation, ast.Name)
                and line.annotation.id in CLASSES
            ):
                assert isinstance(line.target, ast.Name)
                found[line.target.id] = CLASSES[line.annotation.id]
    return found


def _reads_in(function: ast.FunctionDef | ast.Module, holders: dict[str, type]) -> Iterator[str]:
    arguments = function.args if isinstance(function, ast.FunctionDef) else None
    known: dict[str, type] = {}
    for argument in [*arguments.args, *arguments.kwonlyargs] if arguments else []:
        if argument.annotation is not None:
            for name in ast.walk(argument.annotation):
                if isinstance(name, ast.Name) and name.id in CLASSES:
                    known[argument.arg] = CLASSES[name.id]
    body = [node for statement in function.body for node in ast.walk(statement)]
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id in CLASSES:
            known[node.target.id] = CLASSES[node.annotation.id]  # type: ignore[union-attr] - a name, in a function
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if isinstance(target, ast.Name) and (kind := _kind(value, known, holders)):
                    known[target.id] = kind
    literals = {node.value for node in body if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in body:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield from _keys(_kind(node.value, known, holders), node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            for name in literals:
                yield from _keys(_kind(node.args[0], known, holders), name)


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _kind(value: ast.expr, known: dict[str, type], holders: dict[str, type]) -> type | None:
    """The dataclass of the schema that an expression holds, as far as names and annotations tell."""
    if isinstance(value, ast.Name):
        return known.get(value.id)
    if isinstance(value, ast.Attribute):
        if value.attr == "config" and isinstance(value.value, ast.Name | ast.Subscript):
            return TrainConfig  # self.config, jobs[0].config
        if _kind(value.value, known, holders) is TrainConfig:
            return NODES.get(value.attr)
        return holders.get(value.attr)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("load", "resolve"):
        return TrainConfig
    return None


def _keys(kind: type | None, field: str) -> Iterator[str]:
    nodes = [node for node in NODES if kind in types_of_node(node)]
    key = f"{nodes[0]}.{field}" if nodes else field if kind is TrainConfig else ""
    if key in KEYS:
        yield key
