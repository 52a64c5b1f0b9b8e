"""The exceptions that lifl raises on purpose. Imports nothing of lifl.

Each message has the event, the value that caused it, and the remedy. Wrong arguments are plain ``ValueError`` or
``TypeError``; full and empty are return values.
"""


class LiflError(Exception):
    """The root of the hierarchy: ``except LiflError`` catches all of lifl's errors."""


class ShmError(LiflError, OSError):
    """Shared memory could not be taken or used: ``errno``, and the request."""


class ArenaCorruptError(ShmError):
    """The arena's header, tables or sums contradict themselves."""


class LeaseError(LiflError):
    """A lease was used after its release, released twice, or released while a view of it lives."""


class PeerGoneError(LiflError):
    """A process on the other side of a ring died or closed."""


class CheckpointError(LiflError):
    """A checkpoint could not be written or read, or belongs to another run."""


MAX_REASON = 500
"""Characters in the reason of a refusal, which may quote a client's data, and which logs and reports keep."""


def shortened(reason: str) -> str:
    """The reason in at most ``MAX_REASON`` characters: its beginning, and its end, where a traceback has the cause."""
    if len(reason) <= MAX_REASON:
        return reason
    end = MAX_REASON * 3 // 5
    return f"{reason[: MAX_REASON - end - 5]} ... {reason[-end:]}"


class AdmissionError(LiflError, ValueError):
    """An update was refused. The round goes on without it.

    Attributes
    ----------
    client_id : str
        The client that sent the update.
    rule : str
        The rule that it broke: ``keys``, ``shape``, ``dtype``, ``weight``, ``values`` (NaN or Inf), ``norm``
        (too far from the base model to be clipped), ``quota``, ``duplicate``, ``closed``, ``format`` (a reply
        that cannot be read), ``error`` (the client failed) or ``poison`` (workers died while they folded it;
        only in reports).
    value : object
        The value that the client sent.
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
    """The eBPF sidecar cannot run on this machine.

    Attributes
    ----------
    reason : str
    remedy : str
        The way to make it run; empty if none is known.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"eBPF cannot be used: {reason}" + (f"; {remedy}" if remedy else ""))
        self.reason = reason
        self.remedy = remedy
