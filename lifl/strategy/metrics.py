"""Replies whose metrics can be averaged; others are left out, so that no client can end the run with its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message, RecordDict
from flwr.supercore import log

from lifl.errors import AdmissionError
from lifl.report.entries import Rejection
from lifl.round import admission
from lifl.strategy.landing import error_reply


def consistent(contents: list[RecordDict], looks_into_lists: bool) -> list[RecordDict]:
    """The contents of accepted train replies whose metrics have the most frequent form.

    The form is the set of keys, as Flower demands, and for each key whether its value is a list; if `looks_into_lists`
    also the lengths of the lists, as Flower's own mean of metrics demands.
    """
    fit = [content for content in contents if all(map(_is_float, _numbers(content)))]
    common = _most_common([_form(content, looks_into_lists) for content in fit])
    fit = [content for content in fit if _form(content, looks_into_lists) == common]
    if len(fit) < len(contents):
        message = "aggregate_train: metrics of %s replies have another form and are left out"
        log(WARNING, message, len(contents) - len(fit))
    return fit


def averageable(
    server_round: int, replies: list[Message], weight_key: str, looks_into_lists: bool, max_weight: float
) -> list[Message]:
    """Evaluation replies, with an error reply in the place of each that Flower could not average.

    A reply can be averaged if it has exactly one MetricRecord; a weight that is finite, above 0 and at most
    `max_weight`; and the most frequent form among such replies (see :func:`consistent`; here the record's name is part
    of the form). A warning names the others.
    """
    refusals: dict[int, Rejection] = {}
    forms: dict[int, Hashable] = {}
    for at, reply in enumerate(replies):
        if reply.has_error():
            continue
        client = str(reply.metadata.src_node_id)
        try:
            _check(client, reply.content, weight_key, max_weight)
            forms[at] = (next(iter(reply.content.metric_records)), _form(reply.content, looks_into_lists))
        except AdmissionError as error:
            refusals[at] = Rejection(client, error.rule, error.reason)
    common = _most_common(list(forms.values()))
    for at, form in forms.items():
        if form != common:
            client = str(replies[at].metadata.src_node_id)
            refusals[at] = Rejection(client, "format", "the metrics have another form than those of most replies")
    if refusals:
        named = "; ".join(f"{r.client_id} ({r.rule}: {r.reason})" for _, r in sorted(refusals.items()))
        log(WARNING, "aggregate_evaluate: round %s leaves out: %s", server_round, named)
    return [error_reply(r, refusals[at]) if at in refusals else r for at, r in enumerate(replies)]


def _check(client: str, content: RecordDict, weight_key: str, max_weight: float) -> None:
    records = content.metric_records
    if len(records) != 1:
        raise AdmissionError(client, "format", f"{len(records)} MetricRecords, one is expected", len(records))
    metrics = next(iter(records.values()))
    if weight_key not in metrics:
        raise AdmissionError(client, "weight", f"no {weight_key!r} among the metrics {sorted(metrics)[:10]}")
    admission.check_weight(client, metrics[weight_key], max_weight)
    if not all(map(_is_float, _numbers(content))):
        raise AdmissionError(client, "format", "a metric is an integer beyond float64")


def _numbers(content: RecordDict) -> Iterator[Any]:
    for value in next(iter(content.metric_records.values())).values():
        yield from value if isinstance(value, list) else (value,)


def _is_float(value: Any) -> bool:
    """False for an integer beyond float64, which Python cannot multiply with a float; a NaN is allowed."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _form(content: RecordDict, looks_into_lists: bool) -> Hashable:
    metrics = next(iter(content.metric_records.values()))
    return frozenset(
        (key, (len(value) if looks_into_lists else 0) if isinstance(value, list) else None)
        for key, value in metrics.items()
    )


def _most_common(forms: list[Hashable]) -> Hashable:
    return Counter(forms).most_common(1)[0][0] if forms else None
