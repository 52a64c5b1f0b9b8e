"""The arguments that lifl adds to Flower's strategies, and the signature that shows both."""

from __future__ import annotations

import inspect
from os import PathLike
from typing import Any, ClassVar

from lifl.node.node import Node
from lifl.round.admission import Limits
from lifl.round.settings import Order, Timing
from lifl.strategy import tensorboard as scalars


def _show_flowers_arguments(cls: type[RoundOptions]) -> None:
    """Gives a class the signature that its users see: Flower's arguments, then lifl's."""
    own: list[list[inspect.Parameter]] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own.append(list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:])
            if not any(p.kind is p.VAR_KEYWORD for p in own[-1]):
                break  # this class of Flower's names all its arguments, those of its base classes among them
    named = [p for parameters in reversed(own) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    ordered = sorted(named, key=lambda p: p.kind)
    cls.__signature__ = inspect.Signature(ordered)


class RoundOptions:
    """lifl's own arguments, for any strategy whose mean is :class:`FedAvg`'s.

    Parameters
    ----------
    quorum : float or int, optional
        The least number of accepted updates for a round to have a result: a fraction of the sampled nodes (a
        float up to 1.0) or a number (an int). Default: one update, as in Flower.
    deadline : float, optional
        Seconds after which a round, of training or of evaluation, goes on without the missing replies.
        Default: Flower's ``timeout``.
    timing : {"eager", "lazy", "jit"}
        Fold each update on arrival, all updates after the last arrival, or as late as possible so that the fold ends
        when the last update is expected.
    order : {"any", "flower"}
        ``"flower"``: Flower's result bit by bit, from the replies in their order of arrival. All replies stay
        in memory, in the arena and as they came, until the round ends.
    node : lifl.Node, optional
        The Node that folds. Default: the embedded Node of the process, made on first use and closed at exit.
    max_weight : float, optional
        The largest weight that is accepted; a reply with a larger one is refused. Default: 2**100.
    clipping_norm : float, optional
        Bound for the distance of a reply's model from the model that was sent, in the L2 norm over all floating-point
        arrays together. A model beyond the bound is moved to that distance, as Flower's server-side clipping does.
        Default: not bounded.
    client_bytes, total_bytes : int, optional
        Bytes of the arena that one client, and all clients of a round together, may hold at once; an update
        takes whole units of 64 KiB. A reply that does not fit is refused; in the default order it first waits
        until others have been folded. Default: not bounded.
    checkpoint : str or path, optional
        A file that is replaced after each round, atomically, by the state that a run needs to continue: the model, the
        metrics, the reports, the state of ``random`` and ``numpy.random``, and those attributes of the
        strategy that changed since the start (momentum, for example). The file must not exist yet, unless
        `resume` is set. If it cannot be written at the start, :meth:`start` raises
        :class:`lifl.errors.CheckpointError`; a later failure is logged and the run goes on. While one
        run uses the file, :meth:`start` of another run raises that error too.
    resume : bool
        Continue after the last round in `checkpoint`; from the beginning if there is no such file.
        Arguments of :meth:`start` are those of the whole run. Given the same replies, the end is that of
        a run that was never interrupted: with ``order="flower"`` bit by bit, else as near as two such runs are.
    tensorboard : str or path, optional
        A folder for TensorBoard, in which :meth:`start` makes a folder for its run: ``run-1``, ``run-2``, ... A resumed
        run continues in its old folder. Each round adds scalars of the numbers of updates, of the times of the stages,
        and of all metrics. Needs ``pip install 'lifl[tensorboard]'``. A failed write is logged, and the run goes on.
    stop_if_all_refused : bool
        True: if all replies of a round break the same rule, those of more than half of the nodes that were asked, it
        is the program's fault and not the clients': :meth:`start` raises :class:`lifl.errors.RoundError`, which shows
        what was sent and what came back. False: the round has no result, and the run goes on with the old model.
    """

    __signature__: ClassVar[inspect.Signature]
    quorum: float | int | None
    deadline: float | None
    timing: Timing
    order: Order
    node: Node | None
    limits: Limits
    checkpoint: str | PathLike[str] | None
    resume: bool
    tensorboard: str | PathLike[str] | None
    stop_if_all_refused: bool

    def __init__(
        self,
        *args: Any,
        quorum: float | int | None = None,
        deadline: float | None = None,
        timing: Timing = "eager",
        order: Order = "any",
        node: Node | None = None,
        max_weight: float | None = None,
        clipping_norm: float | None = None,
        client_bytes: int | None = None,
        total_bytes: int | None = None,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        tensorboard: str | PathLike[str] | None = None,
        stop_if_all_refused: bool = True,
        **flower: Any,
    ) -> None:
        super().__init__(*args, **flower)
        if quorum is not None and (quorum <= 0 or (isinstance(quorum, float) and quorum > 1)):
            raise ValueError(f"quorum={quorum!r}: give a fraction up to 1.0, or a number of updates as an int")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline={deadline!r}: give seconds above 0")
        if timing not in ("eager", "lazy", "jit"):
            raise ValueError(f"timing={timing!r}: use 'eager', 'lazy' or 'jit'")
        if order not in ("any", "flower"):
            raise ValueError(f"order={order!r}: use 'any' or 'flower'")
        self.quorum = quorum
        self.deadline = deadline
        self.timing = timing
        self.order = order
        self.node = node
        max_weight = Limits().max_weight if max_weight is None else max_weight
        self.limits = Limits(
            max_weight=max_weight, clipping_norm=clipping_norm, client_bytes=client_bytes, total_bytes=total_bytes
        )
        if resume and checkpoint is None:
            raise ValueError("resume=True: name the file to resume from, with checkpoint=")
        self.checkpoint = checkpoint
        self.resume = resume
        if tensorboard is not None:
            scalars.require()
        self.tensorboard = tensorboard
        self.stop_if_all_refused = stop_if_all_refused

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass with its own __init__ shows that one's arguments; else it would inherit __signature__.
        if "__init__" in vars(cls):
            signature = inspect.signature(vars(cls)["__init__"])
            cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        elif cls.__module__.startswith("lifl."):
            _show_flowers_arguments(cls)
