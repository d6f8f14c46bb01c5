"""Imports go down only: `cli > api | streams > connectors | routing > config > schemas`.

The graph is read from the source, imports inside functions included. Each rule is shown to bite on a graph that
breaks it.
"""

from collections.abc import Callable, Iterator

import grimp
import pytest
from grimp import ImportGraph

FLOORS = [{"cli"}, {"api", "streams"}, {"connectors", "routing"}, {"config"}, {"schemas"}]
FLOOR_OF = {package: number for number, floor in enumerate(FLOORS) for package in floor}
# tools beside the floors: what they may import of the product, and who may import them
TOOLS = {"dev": {"schemas", "config"}, "bench": set(FLOOR_OF) | {"dev"}}
MAY_USE = {"dev": {"cli", "bench"}, "bench": set[str]()}
IMPURE = {"asyncio", "os", "random", "secrets", "socket", "subprocess", "threading", "time", "uuid"}


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return grimp.build_graph(*FLOOR_OF, *TOOLS, include_external_packages=True, cache_dir=None)


def imports(graph: ImportGraph) -> Iterator[tuple[str, str]]:
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            yield importer, imported


def top(module: str) -> str:
    return module.partition(".")[0]


def upward_imports(graph: ImportGraph) -> set[tuple[str, str]]:
    """Imports of a floor above, or of a neighbour on the same floor."""
    return {
        (importer, imported)
        for importer, imported in imports(graph)
        if top(importer) in FLOOR_OF and top(imported) in FLOOR_OF and top(importer) != top(imported)
        if FLOOR_OF[top(imported)] <= FLOOR_OF[top(importer)]
    }


def what_routing_sees_beyond_schemas(graph: ImportGraph) -> set[tuple[str, str]]:
    product = set(FLOOR_OF) | set(TOOLS)
    return {
        (importer, imported)
        for importer, imported in imports(graph)
        if top(importer) == "routing" and top(imported) in product - {"routing", "schemas"}
    }


def clocks_dice_and_io_in_routing(graph: ImportGraph) -> set[tuple[str, str]]:
    return {
        (importer, imported)
        for importer, imported in imports(graph)
        if top(importer) == "routing" and top(imported) in IMPURE
    }


def kinds_that_import_each_other(graph: ImportGraph) -> set[tuple[str, str]]:
    kinds = {
        name.removesuffix(".connector")
        for name in graph.modules
        if name.count(".") == 2 and name.startswith("connectors.") and name.endswith(".connector")
    }

    def kind(module: str) -> str | None:
        folder = ".".join(module.split(".")[:2])
        return folder if folder in kinds else None

    return {
        (importer, imported)
        for importer, imported in imports(graph)
        if kind(importer) and kind(imported) and kind(importer) != kind(imported)
    }


def faust_outside_streams(graph: ImportGraph) -> set[tuple[str, str]]:
    """Imports of Faust or of its service library; the benchmark's stock control may use it too."""
    return {
        (importer, imported)
        for importer, imported in imports(graph)
        if top(imported) in {"faust", "mode"} and top(importer) not in {"streams", "bench"}
    }


def misused_tools(graph: ImportGraph) -> set[tuple[str, str]]:
    wrong = set()
    for importer, imported in imports(graph):
        user, used = top(importer), top(imported)
        if user in TOOLS and used in set(FLOOR_OF) - TOOLS[user]:
            wrong.add((importer, imported))
        if used in TOOLS and user != used and user in set(FLOOR_OF) | set(TOOLS) and user not in MAY_USE[used]:
            wrong.add((importer, imported))
    return wrong


RULES: list[tuple[Callable[[ImportGraph], set[tuple[str, str]]], tuple[str, str]]] = [
    (upward_imports, ("config.settings", "streams.app")),
    (upward_imports, ("connectors.registry", "routing.policy")),
    (upward_imports, ("api.app", "streams.lanes")),
    (what_routing_sees_beyond_schemas, ("routing.policy", "config.settings")),
    (clocks_dice_and_io_in_routing, ("routing.backoff", "random")),
    (kinds_that_import_each_other, ("connectors.s3.options", "connectors.webhook.options")),
    (faust_outside_streams, ("connectors.registry", "faust")),
    (misused_tools, ("dev.inbox", "streams.app")),
    (misused_tools, ("streams.app", "dev.stack")),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in RULES))
def test_imports_go_down_only(rule: Callable[[ImportGraph], set[tuple[str, str]]], graph: ImportGraph) -> None:
    assert rule(graph) == set()


@pytest.mark.parametrize(("rule", "breach"), RULES)
def test_a_breach_is_seen(rule: Callable[[ImportGraph], set[tuple[str, str]]], breach: tuple[str, str]) -> None:
    broken = ImportGraph()
    for kind in ("webhook", "s3"):
        broken.add_module(f"connectors.{kind}.connector")
    for module in breach:
        broken.add_module(module)
    assert rule(broken) == set()
    broken.add_import(importer=breach[0], imported=breach[1])
    assert rule(broken) == {breach}


def test_every_package_of_the_product_is_in_the_graph(graph: ImportGraph) -> None:
    assert {top(module) for module in graph.modules} >= {*FLOOR_OF, *TOOLS}
    # an empty graph would pass every rule
    assert ("cli.dev", "dev.stack") in set(imports(graph)) or ("cli.dev", "dev") in set(imports(graph))
