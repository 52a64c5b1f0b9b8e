"""Every exception that lifl raises on purpose. Imports nothing of lifl.

A message says what happened, the value it got, and what to do. Wrong arguments are plain
``ValueError`` or ``TypeError``; full and empty are return values.
"""


class LiflError(Exception):
    """The root of the hierarchy; never raised itself."""


class ShmError(LiflError, OSError):
    """Shared memory could not be had or used: ``errno`` and what was asked for."""


class ArenaCorruptError(ShmError):
    """The arena's header, tables or sums contradict themselves."""


class LeaseError(LiflError):
    """A lease was used after its release, released twice, or released while a view of it lives."""


class PeerGoneError(LiflError):
    """A process on the other side of a ring died or closed."""


class CheckpointError(LiflError):
    """A checkpoint could not be written or read, or belongs to another run."""


MAX_REASON = 500
"""Characters of a refusal's reason: it may quote what a client sent, and is logged and kept in reports."""


def shortened(reason: str) -> str:
    """`reason` in at most ``MAX_REASON`` characters: its beginning, and its end, where a traceback has the cause."""
    if len(reason) <= MAX_REASON:
        return reason
    end = MAX_REASON * 3 // 5
    return f"{reason[: MAX_REASON - end - 5]} ... {reason[-end:]}"


class AdmissionError(LiflError, ValueError):
    """One update was refused. The round goes on without it.

    Attributes
    ----------
    client_id : str
        Whose update it was.
    rule : str
        Which rule it broke: ``keys``, ``shape``, ``dtype``, ``weight``, ``values`` (NaN or Inf), ``norm``
        (too far from the base model to be clipped), ``quota``, ``duplicate``, ``closed``, ``format`` (a reply
        that cannot be read), ``error`` (the client failed) or ``poison`` (workers died while they folded it;
        only in reports).
    value : object
        What it sent instead.
    """

    def __init__(self, client_id: str, rule: str, reason: str, value: object = None) -> None:
        reason = shortened(reason)
        super().__init__(f"update of client {client_id} refused ({rule}): {reason}")
        self.client_id = client_id
        self.rule = rule
        self.reason = reason
        self.value = value


class RoundError(LiflError):
    """A round has no result: too few good updates, the deadline, an overflow, or it was closed."""


class PlanError(LiflError, ValueError):
    """No plan fits; the message names the constraint that fails."""


class EbpfUnavailableError(LiflError):
    """The eBPF sidecar cannot run here.

    Attributes
    ----------
    reason : str
    remedy : str
        What to do; empty if there is nothing.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"eBPF cannot be used: {reason}" + (f"; {remedy}" if remedy else ""))
        self.reason = reason
        self.remedy = remedy
