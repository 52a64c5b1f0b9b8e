"""The drawing of a plan: an outline of its tree, and the tree as a picture for a notebook.

Large trees are abbreviated: a few of the subtrees that are alike are drawn, and the others counted. Prints and writes
nothing; ``lifl.cli.plan_view`` shows the outline on a terminal.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

import attrs

from lifl.planner.hierarchy import Role, Task

COLUMNS = 12
"""Width of the picture in columns of leaves, roughly, from which on subtrees that are alike are counted, not drawn."""
BOXES = 4
"""At most so many leaves of a node are drawn one by one."""

COLOURS = {
    Role.LEAF: ("#8fb4f2", "#2f5fae"),
    Role.MIDDLE: ("#9bd6b0", "#2e7d4f"),
    Role.TOP: ("#c3b1ec", "#6746b0"),
}
"""Fill and stroke of a role; dark ink is legible on every fill."""


def count(n: int, one: str, many: str = "") -> str:
    """``1 leaf``, ``1,200 leaves``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


@attrs.frozen
class Branch:
    """A part of the tree that is drawn as one thing.

    Attributes
    ----------
    role : Role or None
        ``LEAF``: all leaves of one node that feed the same task. ``MIDDLE``, ``TOP``: one task. None: subtrees that
        are not drawn.
    node : str
        The node of the branch; for subtrees that are not drawn the first of their nodes.
    nodes : tuple of str
        All nodes of the branch and of the branches below it.
    sizes : tuple of int
        Updates of each leaf, of the task, or of each subtree that is not drawn.
    height : int
        1 for leaves, otherwise one more than the highest branch below.
    branches : tuple of Branch
        The branches that feed it.
    leaves : tuple of Task
        The tasks of the branch that have clients.
    """

    role: Role | None
    node: str
    nodes: tuple[str, ...]
    sizes: tuple[int, ...]
    height: int
    branches: tuple[Branch, ...] = ()
    leaves: tuple[Task, ...] = ()

    @property
    def updates(self) -> int:
        """All updates of the branch."""
        return sum(self.sizes)

    @property
    def columns(self) -> int:
        """The approximate width, in leaves."""
        if self.role is None:
            return 2
        return max(2, min(BOXES, len(self.leaves)), sum(branch.columns for branch in self.branches))

    @property
    def label(self) -> str:
        """The branch in a line of words."""
        updates = count(self.updates, "update")
        if self.role is None:
            like = f"like it on {self.node if len(self.nodes) == 1 else f'{len(self.nodes):,} nodes'}"
            if len(self.nodes) == len(self.sizes) > 1:
                like = "nodes like it"
            return f"{len(self.sizes):,} more {like}: {updates}{f', {each(self.sizes)}' if len(self.sizes) > 1 else ''}"
        if self.role is Role.LEAF and len(self.sizes) > 1:
            return f"{len(self.sizes):,} leaves on {self.node}: {updates}, {each(self.sizes)}"
        over = f" from {len(self.nodes):,} nodes" if len(self.nodes) > 1 else ""
        return f"{self.role.value} on {self.node}: {updates}{over}"


def each(sizes: Sequence[int]) -> str:
    """``16 each``, ``15 or 16 each``, ``1 to 16 each``."""
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{least:,} each"
    return f"{least:,} {'or' if most - least == 1 else 'to'} {most:,} each"


def outline(tasks: Sequence[Task]) -> Branch:
    """The tree of a plan's tasks, abbreviated; the top is its root.

    Branches that feed a task are alike if they are on the task's node, or each over several nodes, or each on one other
    node and equally high. If n branches, at most c columns wide, are alike, all are drawn if
    ``n * c <= COLUMNS + BOXES``, else the first ``max(1, COLUMNS // c)``.
    """
    made: list[Branch] = []
    for task in tasks:
        if not task.inputs:
            role = task.role
            made.append(Branch(role, task.node, (task.node,), (len(task.clients),), 1, (), (task,)))
            continue
        inputs = _together([made[i] for i in task.inputs])
        nodes = dict.fromkeys(name for branch in inputs for name in branch.nodes)
        made.append(
            Branch(
                task.role,
                task.node,
                tuple(nodes),
                (sum(branch.updates for branch in inputs),),
                1 + max(branch.height for branch in inputs),
                tuple(_abbreviated(inputs, task.node)),
            )
        )
    return made[-1]


def _together(inputs: Sequence[Branch]) -> list[Branch]:
    """The inputs, with the leaves of a node as one branch."""
    left: list[Branch] = []
    leaves: dict[str, list[Branch]] = {}
    for branch in inputs:
        if branch.role is Role.LEAF:
            if branch.node not in leaves:
                leaves[branch.node] = []
                left.append(branch)
            leaves[branch.node].append(branch)
        else:
            left.append(branch)
    return [
        attrs.evolve(
            branch,
            sizes=tuple(one.sizes[0] for one in leaves[branch.node]),
            leaves=tuple(one.leaves[0] for one in leaves[branch.node]),
        )
        if branch.role is Role.LEAF
        else branch
        for branch in left
    ]


def _abbreviated(inputs: Sequence[Branch], node: str) -> Iterator[Branch]:
    alike: dict[str | int, list[Branch]] = {}
    for branch in inputs:
        # "several nodes" ignores the height: subtrees of several heights lie side by side at every level, and if
        # each height were a kind, one of each would be drawn, and again of each of their inputs.
        kind = "here" if branch.nodes == (node,) else "several nodes" if len(branch.nodes) > 1 else branch.height
        alike.setdefault(kind, []).append(branch)
    for group in alike.values():
        columns = max(branch.columns for branch in group)
        shown = len(group) if len(group) * columns <= COLUMNS + BOXES else max(1, COLUMNS // columns)
        yield from group[:shown]
        if rest := group[shown:]:
            nodes = tuple(dict.fromkeys(name for branch in rest for name in branch.nodes))
            sizes = tuple(branch.updates for branch in rest)
            yield Branch(None, rest[0].node, nodes, sizes, max(branch.height for branch in rest))


# ---------------------------------------------------------------- the picture

BOX, GAP, PAD = 46, 8, 14
"""Width of a leaf's box, the gap between two boxes, and that between boxes and the edge of their node, in pixels."""
ROW, THICK = 92, 32
"""Distance from one level to the next, and the height of a box."""
MARGIN, HEAD = 22, 74
"""Space around the picture, and above the tree for its title."""
MORE = 150
"""Width of the card for subtrees that are not drawn."""
INK, MUTED, LINE, PAPER, CARD = "#1f2430", "#566070", "#8a94a3", "#fbfbf8", "#eef1f6"
FONT = "ui-sans-serif, system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif"


def tree_svg(tasks: Sequence[Task], head: str, line: str, label: str) -> str:
    """A plan's tree as an SVG element: the top above, its nodes as cards, their leaves as boxes with their updates.

    `head` and `line` are above the tree; `label` is for screen readers. The picture has its own light background, so
    that it is legible in a dark notebook too, and refers to nothing outside. A tooltip names the clients of a leaf.
    Names are escaped.
    """
    root = outline(tasks)
    if root.branches:
        line += "; a blue box is a leaf, with its updates"
    tree = _Picture(root)
    width = max(tree.width, _text_width(head, 16), _text_width(line, 12)) + 2 * MARGIN
    height = HEAD + tree.height + MARGIN
    tree.draw((width - tree.width) / 2, HEAD)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
            f' viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{_escaped(label)}"'
            f' style="max-width:100%;height:auto" font-family="{FONT}" font-size="12">',
            f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="10"'
            f' fill="{PAPER}" stroke="#cfd4dc"/>',
            _text(MARGIN, 34, head, 16, anchor="start", weight=600),
            _text(MARGIN, 54, line, 12, anchor="start", fill=MUTED),
            *tree.cards,
            *tree.edges,
            *tree.boxes,
            "</svg>",
        )
    )


class _Picture:
    """Places all branches, by the widths of the branches below them, and holds the elements in three layers."""

    def __init__(self, root: Branch) -> None:
        self.root = root
        self.cards: list[str] = []
        self.edges: list[str] = []
        self.boxes: list[str] = []
        self.width = self._width(root, is_root_of_node=len(root.nodes) == 1)
        self.height = (root.height - 1) * ROW + THICK + 2 * PAD + 24

    def draw(self, left: float, top: float) -> None:
        """Draws the tree with its left upper corner at (left, top)."""
        self.left, self.top = left, top
        self._draw(self.root, left, self.width, None, is_root_of_node=len(self.root.nodes) == 1)

    def _width(self, branch: Branch, is_root_of_node: bool) -> float:
        if branch.role is None:
            return MORE
        within = sum(self._width(one, self._is_root_of_node(one, branch)) for one in branch.branches)
        within += GAP * 2 * (len(branch.branches) - 1)
        boxes = min(BOXES, len(branch.leaves))
        width = max(within, boxes * BOX + GAP * (boxes - 1), 0 if branch.role is Role.LEAF else self._pill(branch))
        if is_root_of_node:
            width = max(width, min(150.0, _text_width(_node_line(branch), 12))) + 2 * PAD
        return width

    @staticmethod
    def _is_root_of_node(branch: Branch, parent: Branch) -> bool:
        """True if a card is drawn around the branch: it is on one node, and feeds a task that is over several nodes."""
        return branch.role is not None and len(branch.nodes) == 1 and len(parent.nodes) > 1

    @staticmethod
    def _pill(branch: Branch) -> float:
        return max(84.0, min(220.0, _text_width(_pill_text(branch), 12) + 24))

    def _y(self, height: int) -> float:
        return self.top + PAD + (self.root.height - height) * ROW

    def _draw(
        self, branch: Branch, left: float, width: float, over: tuple[float, int] | None, is_root_of_node: bool
    ) -> None:
        """Draws the branch in its columns; `over` is the middle and the height of the branch that it feeds."""
        x, y = left + width / 2, self._y(branch.height)
        bottom = self._y(1) + THICK + PAD + 24
        if branch.role is None:
            self._draw_more(branch, left, y, bottom)
            self._edge(x, y - PAD, over, " stroke-dasharray='4 4'")
            return
        if is_root_of_node:
            self.cards.append(
                f'<rect x="{left:.1f}" y="{y - PAD:.1f}" width="{width:.1f}" height="{bottom - y + PAD:.1f}" rx="9"'
                f' fill="{CARD}" stroke="#cfd4dc"><title>{_escaped(_node_line(branch))}</title></rect>'
            )
            line = _clipped(_node_line(branch), width - PAD, 12)
            self.boxes.append(_text(x, bottom - 11, line, 12, fill=MUTED))
        if branch.role is Role.LEAF:
            self._draw_leaves(branch, x, y, over)
            return
        self._edge(x, y, over)
        pill = self._pill(branch)
        text = _clipped(_pill_text(branch), pill - 12, 12)
        self.boxes.append(_box(x - pill / 2, y, pill, branch.role, text, branch.label, THICK / 2))
        inner = sum(self._width(one, self._is_root_of_node(one, branch)) for one in branch.branches)
        at = left + (width - inner - GAP * 2 * (len(branch.branches) - 1)) / 2
        for one in branch.branches:
            wide = self._width(one, self._is_root_of_node(one, branch))
            self._draw(one, at, wide, (x, branch.height), self._is_root_of_node(one, branch))
            at += wide + GAP * 2

    def _draw_leaves(self, branch: Branch, x: float, y: float, over: tuple[float, int] | None) -> None:
        shown = len(branch.leaves) if len(branch.leaves) <= BOXES else BOXES - 1
        boxes = min(BOXES, len(branch.leaves))
        at = x - (boxes * BOX + (boxes - 1) * GAP) / 2
        for task in branch.leaves[:shown]:
            self._edge(at + BOX / 2, y, over)
            n = len(task.clients)
            short = f"{n:,}" if n < 100_000 else f"{n // 1000:,}k"
            self.boxes.append(_box(at, y, BOX, Role.LEAF, short, _clients(task), 6))
            at += BOX + GAP
        if rest := branch.leaves[shown:]:
            self._edge(at + BOX / 2, y, over, " stroke-dasharray='4 4'")
            label = f"{len(rest):,} more leaves, {each([len(task.clients) for task in rest])}"
            fill, stroke = "none", COLOURS[Role.LEAF][1]
            self.boxes.append(
                f'<g><title>{label}</title><rect x="{at:.1f}" y="{y:.1f}" width="{BOX}" height="{THICK}" rx="6"'
                f' fill="{fill}" stroke="{stroke}" stroke-dasharray="4 3"/>'
                f"{_text(at + BOX / 2, y + THICK / 2 + 4, f'+{len(rest):,}', 12)}</g>"
            )

    def _draw_more(self, branch: Branch, left: float, y: float, bottom: float) -> None:
        if len(branch.nodes) != len(branch.sizes):  # no whole nodes, so the card is not as high as the cards beside it
            bottom = y + THICK + PAD + 24
        for shift in (8, 4, 0) if len(branch.sizes) > 1 else (0,):  # a pile of cards
            self.cards.append(
                f'<rect x="{left + shift:.1f}" y="{y - PAD + shift:.1f}" width="{MORE - 8}"'
                f' height="{bottom - y + PAD - 8:.1f}" rx="9" fill="{CARD}" stroke="#b6bfcc" stroke-dasharray="4 3"/>'
            )
        lines = _more_lines(branch)
        middle = (y - PAD + bottom - 8) / 2 - 14
        for i, line in enumerate(lines):
            line = _clipped(line, MORE - 14, 12)
            self.boxes.append(_text(left + (MORE - 8) / 2, middle + 18 * i, line, 12, weight=400 if i else 600))

    def _edge(self, x: float, y: float, over: tuple[float, int] | None, style: str = "") -> None:
        """Draws a line from a branch to the one that it feeds: straight up first, so that it crosses no card."""
        if over is None:
            return
        end_x, height = over
        start, end = self._y(height - 1) - PAD, self._y(height) + THICK
        middle = (start + end) / 2
        bend = f"{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {end:.1f}"
        self.edges.append(
            f'<path d="M{x:.1f} {y:.1f}V{start:.1f}C{bend}" fill="none" stroke="{LINE}" stroke-width="1.4"{style}/>'
        )


def _more_lines(branch: Branch) -> tuple[str, str, str]:
    """The text of a card for subtrees that are not drawn: their number, their nodes, and the updates of each."""
    if len(branch.nodes) == len(branch.sizes) > 1:
        head, where = f"{len(branch.sizes):,} more nodes", "like it"
    else:
        head = f"{len(branch.sizes):,} more like it"
        where = f"on {branch.node if len(branch.nodes) == 1 else count(len(branch.nodes), 'node')}"
    is_one = max(branch.sizes) == 1
    return head, where, f"of {each(branch.sizes).removesuffix(' each')} {'update' if is_one else 'updates'}"


def _node_line(branch: Branch) -> str:
    return f"{branch.node}: {count(branch.updates, 'update')}"


def _pill_text(branch: Branch) -> str:
    assert branch.role is not None
    if branch.leaves:  # a tree of one task
        return f"{branch.role.value}: {count(branch.updates, 'update')}"
    return branch.role.value if len(branch.nodes) == 1 else f"{branch.role.value} on {branch.node}"


def _clients(task: Task) -> str:
    """The text of a leaf's tooltip: its clients, the first of them by name."""
    names = ", ".join(task.clients[:8])
    more = f" and {len(task.clients) - 8:,} more" if len(task.clients) > 8 else ""
    return f"leaf on {task.node}, {count(len(task.clients), 'update')}: {names}{more}"


def _box(left: float, y: float, width: float, role: Role, text: str, label: str, round_: float) -> str:
    fill, stroke = COLOURS[role]
    return (
        f'<g><title>{_escaped(label)}</title><rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{THICK}"'
        f' rx="{round_:g}" fill="{fill}" stroke="{stroke}" stroke-width="1.3"/>'
        f"{_text(left + width / 2, y + THICK / 2 + 4, text, 12)}</g>"
    )


def _text(
    x: float, y: float, text: str, size: int, *, anchor: str = "middle", fill: str = INK, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
        f' fill="{fill}">{_escaped(text)}</text>'
    )


def _escaped(text: str) -> str:
    """Text for XML, which cannot have control characters even if they are escaped."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _text_width(text: str, size: int) -> float:
    """The approximate width in pixels: fonts differ, and letters beyond Latin may be twice as wide."""
    return sum(0.6 if c < "\u0250" else 1.1 for c in text) * size


def _clipped(text: str, width: float, size: int) -> str:
    """The part of the text that fits."""
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text, size) > width - size:
        text = text[:-1]
    return f"{text}\N{HORIZONTAL ELLIPSIS}"
