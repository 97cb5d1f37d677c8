"""The shape of the code, enforced: who may import whom, one file that communicates, sizes, forbidden names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "megaclass").rglob("*.py"))

# Highest first; a file may import from its own layer and below. The longest matching prefix counts.
LAYERS = {
    "cli": 6,
    "__main__": 6,
    "train.run": 5,
    "train.attempt": 5,
    "train.trained": 5,
    "train.classes": 5,
    "train.dry_run": 5,
    "train.preview": 5,
    "train.build": 5,
    "study": 5,
    "bench": 5,
    "plan": 5,
    "train": 4,
    "checkpoint": 4,
    "evaluate": 4,
    "prepare": 4,
    "observe.report": 4,
    "classifier": 3,
    "class_layer": 3,
    "pass_rows": 3,
    "micro_batch": 3,
    "loss": 3,
    "sampling": 2,
    "neighbours": 2,
    "optim": 2,
    "data": 2,
    "observe": 2,
    "parallel": 1,
    "host_rows": 1,
    "row_stream": 1,
    "backbones": 1,
    "data.batch": 1,
    "data.manifest": 1,
    "data.records": 1,
    "data.address": 1,
    "config": 1,
    "objectives": 0,
    "kernels": 0,
    "counter": 0,
    "marks": 0,
    "errors": 0,
    "durable": 0,
    "provenance": 0,
    "": 0,
}
COMMUNICATION = {
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
    "broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "scatter",
    "send", "recv", "isend", "irecv", "all_gather_object", "broadcast_object_list", "gather_object", "barrier",
}  # fmt: skip
ENGINES = {"train.fsdp": ("torch.distributed.fsdp", "torch.distributed.tensor")}
OPTIONAL = {"deepspeed", "faiss", "nvidia", "triton", "onnx", "s3fs", "gcsfs", "pyarrow"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "megaclass").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer(module: str) -> int:
    return LAYERS[
        max((name for name in LAYERS if module == name or module.startswith(f"{name}.") or not name), key=len)
    ]


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node))
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    own = layer(module_name(path))
    for name, _ in imports(ast.parse(path.read_text())):
        if name == "megaclass" or not name.startswith("megaclass."):
            continue
        target = name.removeprefix("megaclass.")
        if not any(
            (ROOT / "megaclass" / Path(*target.split("."))).with_suffix(suffix).exists() for suffix in ("", ".py")
        ):
            continue  # a name in a module, whose module is listed as well
        assert layer(target) <= own, f"{module_name(path)} (layer {own}) imports {target} (layer {layer(target)})"
        assert target != "cli" or own == 6, "the command line is imported by nothing below it"


def test_the_table_of_layers_in_contributing_is_this_one() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {}
    for number, files in re.findall(r"^\| (\d) \| (.*) \|$", text, re.MULTILINE):
        for path in re.findall(r"`([\w/]+)`", files):
            shown[path.strip("/").replace("/", ".")] = int(number)
    assert shown == {name: number for name, number in LAYERS.items() if name not in ("", "__main__")}


# What the pure packages may import of ours, beside themselves.
PURE = {"objectives": ("megaclass.errors", "megaclass.counter", "megaclass.kernels.terms"), "kernels": ()}
STANDARD = {
    "__future__",
    "abc",
    "collections",
    "dataclasses",
    "typing",
    "math",
    "functools",
    "weakref",
    "difflib",
    "itertools",
    "contextlib",
    "os",
}


def test_objectives_and_kernels_are_pure() -> None:
    for path in FILES:
        module = module_name(path)
        package = module.split(".")[0]
        if package not in PURE:
            continue
        for name, _ in imports(ast.parse(path.read_text())):
            allowed = (
                "torch",
                f"megaclass.{package}",
                *PURE[package],
                *(["triton"] if module == "kernels.triton" else []),
            )
            # `from megaclass import counter` is listed as megaclass.counter too.
            is_listed = name == "megaclass" or name.split(".")[0] in STANDARD
            assert is_listed or name.startswith(allowed), f"{module} imports {name}"
            assert not name.startswith("torch.distributed"), f"{module} imports {name}"


def test_only_one_file_communicates_and_one_starts_the_group() -> None:
    for path in FILES:
        module = module_name(path)
        tree = ast.parse(path.read_text())
        uses = {name for name, _ in imports(tree) if name.startswith("torch.distributed")}
        # What cuts the backbone sends by itself, as DistributedDataParallel does.
        uses = {name for name in uses if not name.startswith(ENGINES.get(module, "none"))}
        if module not in ("parallel.collectives", "parallel.process"):
            assert not uses, f"{module} imports {uses}; tensors are sent in parallel/collectives.py"
        calls = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name) and node.func.value.id == "dist"
        }  # fmt: skip
        if module != "parallel.collectives":
            # The barrier that processes part at is the one exception.
            assert calls & COMMUNICATION <= ({"barrier"} if module == "parallel.process" else set()), (module, calls)
        if module != "parallel.process":
            assert not calls & {"init_process_group", "destroy_process_group"}, module


def test_optional_packages_are_imported_where_they_are_needed() -> None:
    """At no file's top but that of the file named after them, which in turn nobody imports at the top."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            for name, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else []:
                package = name.split(".")[0]
                assert package not in OPTIONAL - {path.stem}, f"{module_name(path)} imports {name} at its top"
                assert not name.startswith("megaclass.") or name.split(".")[-1] not in OPTIONAL, (
                    f"{module_name(path)} imports {name} at its top"
                )


def test_no_pickle_and_no_shell() -> None:
    forbidden = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "subprocess"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        # It only decodes opcodes; the values are made by an interpreter of ours that cannot call anything.
        allowed = {"pickletools"} if module_name(path) == "prepare.pickled" else set()
        assert not ((forbidden | {"pickletools"}) - allowed) & {name.split(".")[0] for name, _ in imports(tree)}, (
            module_name(path)
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "torch.load", "torch.save", "yaml.load"), (
                    module_name(path), called,
                )  # fmt: skip
                for keyword in node.keywords:
                    is_unsafe = keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
                    assert not is_unsafe, module_name(path)


def test_the_class_layer_reads_nothing_back_to_the_host() -> None:
    """A value read in forward or backward stalls a GPU; the peer does it twice in every step."""
    for path in FILES:
        module = module_name(path)
        is_inside = module.split(".")[0] in ("objectives", "kernels", "class_layer")
        if is_inside or module in ("parallel.collectives", "parallel.exchange"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
                # What goes where must be known on the host: of an uneven gather, which serves evaluation only, and
                # where embeddings are routed to their owners.
                is_uneven = module in ("parallel.collectives", "parallel.exchange") and name == "tolist"
                assert name not in ("item", "tolist", "cpu", "numpy") or is_uneven, (module, name)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "two ideas in one file?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0
            assert length <= 60, f"{node.name} has {length} lines of statements"


def test_no_file_without_a_concept() -> None:
    for path in FILES:
        assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc", "core", "base"), path
