"""Drawings: all that is in a plan is drawn or counted, nothing overlaps, and no name gets out of its place."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given

from lifl.planner.drawing import BOXES, COLOURS, COLUMNS, GAP, Branch, _more_lines, count, each, outline
from lifl.planner.hierarchy import Role
from lifl.planner.load import ServerNode
from lifl.planner.plan import Plan, make_plan
from tests.planner.clusters import plans

SVG = "{http://www.w3.org/2000/svg}"


def plan_of(clients: int, *rooms: int, cores: int = 8, arity: int | None = None) -> Plan:
    """A plan on nodes with so much room each."""
    nodes = [ServerNode(f"n{i}", room, cores) for i, room in enumerate(rooms)]
    return make_plan([f"c{i}" for i in range(clients)], nodes, arity=arity)


def lines(branch: Branch) -> list[str]:
    """The outline as a terminal shows it."""
    return [branch.label, *(f"  {line}" for one in branch.branches for line in lines(one))]


def check(branch: Branch) -> None:
    """Checks that the updates below a branch add up to the branch's."""
    if branch.branches:
        assert branch.updates == sum(one.updates for one in branch.branches)
        assert {name for one in branch.branches for name in one.nodes} == set(branch.nodes)
        assert branch.height == 1 + max(one.height for one in branch.branches)
    for one in branch.branches:
        check(one)


@given(plans())
def test_everything_is_drawn_or_counted(plan: Plan) -> None:
    """The root has all updates and nodes, and each branch what is below it."""
    root = outline(plan.tasks)
    assert (root.role, root.node, root.height) == (Role.TOP, plan.top.node, plan.levels)
    assert root.updates == plan.updates
    assert set(root.nodes) == {group.node for group in plan.placement.groups}
    check(root)


def test_a_small_tree_is_drawn_whole() -> None:
    """Task by task, the leaves of a node in one line."""
    assert lines(outline(plan_of(11, 4, 6, 3).tasks)) == [
        "top on n1: 11 updates from 3 nodes",
        "  3 leaves on n1: 6 updates, 2 each",
        "  middle on n0: 4 updates",
        "    2 leaves on n0: 4 updates, 2 each",
        "  leaf on n2: 1 update",
    ]
    assert lines(outline(plan_of(1, 1).tasks)) == ["top on n0: 1 update"]


def test_what_is_alike_is_counted() -> None:
    """The first few nodes are drawn, and of more levels the first at each."""
    assert lines(outline(plan_of(1000, *[10] * 100, cores=4).tasks)) == [
        "top on n0: 1,000 updates from 100 nodes",
        "  4 leaves on n0: 10 updates, 2 or 3 each",
        "  middle on n1: 10 updates",
        "    4 leaves on n1: 10 updates, 2 or 3 each",
        "  middle on n2: 10 updates",
        "    4 leaves on n2: 10 updates, 2 or 3 each",
        "  middle on n3: 10 updates",
        "    4 leaves on n3: 10 updates, 2 or 3 each",
        "  96 more nodes like it: 960 updates, 10 each",
    ]
    assert lines(outline(plan_of(64, 64, cores=64, arity=2).tasks)) == [
        "top on n0: 64 updates",
        "  middle on n0: 32 updates",
        "    middle on n0: 16 updates",
        *[
            "      middle on n0: 8 updates",
            "        middle on n0: 4 updates",
            "          2 leaves on n0: 4 updates, 2 each",
        ],
        *["        middle on n0: 4 updates", "          2 leaves on n0: 4 updates, 2 each"],
        *[
            "      middle on n0: 8 updates",
            "        middle on n0: 4 updates",
            "          2 leaves on n0: 4 updates, 2 each",
        ],
        *["        middle on n0: 4 updates", "          2 leaves on n0: 4 updates, 2 each"],
        "    middle on n0: 16 updates",
        *[
            "      middle on n0: 8 updates",
            "        middle on n0: 4 updates",
            "          2 leaves on n0: 4 updates, 2 each",
        ],
        *["        middle on n0: 4 updates", "          2 leaves on n0: 4 updates, 2 each"],
        *[
            "      middle on n0: 8 updates",
            "        middle on n0: 4 updates",
            "          2 leaves on n0: 4 updates, 2 each",
        ],
        *["        middle on n0: 4 updates", "          2 leaves on n0: 4 updates, 2 each"],
        "  1 more like it on n0: 32 updates",
    ]


@pytest.mark.parametrize("arity", [None, 2, 3, 8])
def test_a_huge_tree_stays_small(arity: int | None) -> None:
    """A thousand nodes of all sizes: the picture and the outline have a bounded length."""
    plan = plan_of(20_000, *[i % 40 + 1 for i in range(1000)], cores=40, arity=arity)
    assert plan.nodes_used > 800
    root = outline(plan.tasks)
    assert root.columns <= (COLUMNS + BOXES) * (2 + plan.levels)
    assert len(lines(root)) < 150
    assert len(plan._repr_html_()) < 60_000


Box = tuple[float, float, float, float]


def rects(plan: Plan) -> list[tuple[str, Box]]:
    """Fill and edges (left, top, right, bottom) of each rectangle; the first is the paper."""
    found = []
    for rect in ElementTree.fromstring(plan._repr_html_()).iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        found.append((rect.attrib["fill"], (x, y, x + width, y + height)))
    return found


def overlap(one: Box, other: Box, apart: float = 0) -> bool:
    """True if two rectangles share more than an edge, or are less than so many pixels apart."""
    across = one[0] < other[2] + apart and other[0] < one[2] + apart
    return across and one[1] < other[3] + apart and other[1] < one[3] + apart


@given(plans())
def test_nothing_overlaps_or_leaves_the_paper(plan: Plan) -> None:
    """No two tasks, and no task's box and another node's card."""
    (_, paper), *others = rects(plan)
    fills = {fill for fill, _ in COLOURS.values()} | {"none"}
    boxes = [box for fill, box in others if fill in fills]
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair, apart=GAP - 1)]
    for _, box in others:
        assert paper[0] <= box[0] < box[2] <= paper[2]
        assert paper[1] <= box[1] < box[3] <= paper[3]
    for _, card in (one for one in others if one[0] not in fills):
        for box in boxes:
            assert not overlap(card, box) or (card[0] <= box[0] and box[2] <= card[2] and card[1] <= box[1])


@given(plans())
def test_each_role_has_its_colour(plan: Plan) -> None:
    """The drawing has one top, and a box for each task if all are drawn."""
    fills = [fill for fill, _ in rects(plan)]
    assert fills.count(COLOURS[Role.TOP][0]) == 1
    drawn = sum(fills.count(fill) for fill, _ in COLOURS.values())
    assert drawn <= len(plan.tasks)
    if all(len(group.clients) <= BOXES for group in plan.placement.groups) and plan.nodes_used <= 3:
        assert drawn == len(plan.tasks)


def test_names_cannot_get_out() -> None:
    """Markup, quotes and control characters of a name are shown, and do nothing; a long one is cut."""
    nodes = [
        ServerNode('<script>alert("x")</script>&', 3),
        ServerNode("a\x00\n" + "n" * 200, 3),
        ServerNode("日本" * 40, 3),
    ]
    plan = make_plan(['"><svg onload=1>', *"bcdefghi"], nodes)
    html = plan._repr_html_()
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(html).iter()}
    assert tags == {"svg", "rect", "text", "title", "path", "g"}
    assert "onload=1>" not in html
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert max(map(len, texts)) < 150
    assert not [text for text in texts if "n" * 40 in text]


def test_a_card_has_the_whole_name_of_its_node() -> None:
    """Colons and all; and one update is no plural."""
    address = "10.0.0.1:90"
    alone = Branch(None, address, (address,), (1, 1, 1), 1)
    assert _more_lines(alone) == ("3 more like it", f"on {address}", "of 1 update")
    several = Branch(None, "a", ("a", "b"), (4, 5, 6), 1)
    assert _more_lines(several) == ("3 more like it", "on 2 nodes", "of 4 to 6 updates")
    whole = Branch(None, "a", ("a", "b"), (4, 5), 1)
    assert _more_lines(whole) == ("2 more nodes", "like it", "of 4 or 5 updates")


def test_the_picture_refers_to_nothing_outside() -> None:
    """It can be saved, mailed, and put into a page that loads nothing."""
    svg = plan_of(100, *[10] * 12)._repr_html_()
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    assert "href" not in svg
    assert "url(" not in svg


def test_words() -> None:
    """Numbers are grouped, and one is no plural."""
    assert [count(n, "leaf", "leaves") for n in (0, 1, 1200)] == ["0 leaves", "1 leaf", "1,200 leaves"]
    assert count(2, "node") == "2 nodes"
    assert [each(sizes) for sizes in ((3,), (3, 3), (3, 4), (3, 5, 4))] == [
        "3 each",
        "3 each",
        "3 or 4 each",
        "3 to 5 each",
    ]
