"""The way of imports: a folder takes from folders below it, and no module comes back to itself."""

import ast
from collections import defaultdict
from pathlib import Path

import mlx_unet3d

PACKAGE = Path(mlx_unet3d.__file__).parent
# From the top: each imports from those after it alone. Modules beside the folders are for all.
ORDER = ("cli", "memory", "pipelines", "models", "schedulers", "checkpoints", "media", "layers")


def imports() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Modules of the package, as their parts, and those of the package that each imports, late ones too."""
    found = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        folder = parts[:-1]
        name = folder if parts[-1] == "__init__" else parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder[: len(folder) - node.level + 1] + tuple(
                    (node.module or "").split(".") * bool(node.module)
                )
                for alias in node.names:
                    inner = (*base, alias.name)
                    is_module = (
                        PACKAGE.joinpath(*inner).is_dir()
                        or PACKAGE.joinpath(*inner).with_suffix(".py").exists()
                    )
                    found[name].add(inner if is_module else base)
    return found


def test_folders_import_downwards():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == set(ORDER)
    rank = {name: i for i, name in enumerate(ORDER)}
    for module, others in imports().items():
        for other in others:
            if len(module) > 1 and other and other[0] in rank and other[0] != module[0]:
                assert rank[module[0]] < rank[other[0]], f"{'.'.join(module)} imports {'.'.join(other)}"


def test_no_module_comes_back_to_itself():
    graph = imports()
    done: set[tuple[str, ...]] = set()

    def visit(module, path):
        assert module not in path, f"a circle: {[*path[path.index(module) :], module]}"
        if module not in done:
            for other in graph.get(module, ()):
                if other != module:
                    visit(other, [*path, module])
            done.add(module)

    for module in list(graph):
        visit(module, [])
