"""The plan that ``lifl plan`` shows: its tree, for a terminal."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from lifl.planner.drawing import Branch, outline
from lifl.planner.hierarchy import Role
from lifl.planner.plan import Plan

STYLES = {Role.LEAF: "blue", Role.MIDDLE: "green", Role.TOP: "bold magenta", None: "dim"}


def plan_tree(plan: Plan) -> Tree:
    """The plan's tree, abbreviated by :func:`~lifl.planner.drawing.outline`."""
    root = outline(plan.tasks)
    tree = Tree(_line(root), guide_style="dim")
    _grow(tree, root)
    return tree


def _grow(tree: Tree, branch: Branch) -> None:
    for one in branch.branches:
        _grow(tree.add(_line(one)), one)


def _line(branch: Branch) -> Text:
    return Text(branch.label, STYLES[branch.role])
