"""The pages say what is true now: README and documentation name no plan. The changelog may."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)

PLANS = {
    r"later": "Something that is not there. For an order of events name the event: 'after that', 'in the next round'.",
    r"(?:next|future|coming|upcoming) (?:release|version|change)s?": "A reader has this release and no other.",
    r"(?:in the|near|for the) future": "A reader has this release and no other.",
    r"issues?": "A work item. The page of a fault names the fault.",
    r"to come": "Something that is not there. Updates arrive; a reply is still on its way.",
    r"(?:will|shall) (?:be|become|come|get|support|gain|follow)": "A promise. For a consequence use the present.",
    r"(?:is|are|was|were) (?:also |still )?planned|planned (?:for|as an?)": "A promise. Only the planner plans.",
    r"(?:is|are) (?:intended|meant|going) to": "A promise, or an intention that the code may not keep.",
    r"yet": "'not yet' promises; 'not' is as true.",
    # "as soon as" is an order of events, and the one idiom with this word.
    r"(?<!as\s)soon(?!\sas)": "A promise.",
    r"eventually|some ?day|one day|sooner or later": "A promise without a date.",
    r"today|currently|at present|for now|for the time being": "It says that this is about to change.",
    r"roadmap|backlog|upcoming|work in progress|TODO|TBD|FIXME": "The name of a plan.",
}
"""word of a plan, looked for as a whole word in any case -> why no page needs it."""


def plans_in(text: str) -> list[str]:
    """The words of plans in a page, each with its line. Blocks of code are programs and output, and no claims."""
    prose = FENCE.sub(lambda block: "\n" * block.group().count("\n"), text)
    found = []
    for words, reason in PLANS.items():
        # A line may end between two words.
        pattern = rf"\b(?:{words})\b".replace(" ", r"\s+")
        for match in re.finditer(pattern, prose, re.IGNORECASE):
            line = prose.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: {match.group()!r}. {reason}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_no_plan(page: Path) -> None:
    """A page has no word of a plan, and no number of a work item."""
    assert not plans_in(page.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "a stock SuperLink today, `lifl-superlink` later",
        "More than one machine is a later release.",
        "some is to\ncome with that front (issue 5)",
        "dropping idle ones is to come",
        "Lists will be folded.",
        "A front is planned.",
        "lifl is not on a package index yet",
        "This comes soon.",
    ],
)
def test_plan_is_found(text: str) -> None:
    """The words that the pages once had are found, also across the end of a line."""
    assert plans_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "10,000 clients planned on 100 nodes: 2 ms",
        "An update is folded as soon as it is ready.",
        "The updates that are still to be folded wait.",
        "```python\nlater = [nodes[0]]\n```",
    ],
)
def test_other_uses_are_no_plans(text: str) -> None:
    """The planner's nouns, an order of events and programs are let through."""
    assert plans_in(text) == []
