"""The options of `xccl bench a2e` and `e2a` that other benchmarks have not: where attention and experts are."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final

from xccl.cli.parsing import whole_number
from xccl.errors import UsageError

#: Experts, and expert dies, if neither these nor ranks are asked for.
DEFAULT_EXPERTS: Final = 8


@dataclass(frozen=True)
class Deployment:
    """Attention dies come first, domain after domain, then the expert dies.

    Attributes:
        attention: attention dies of each domain.
        domains: data-parallel domains that share the experts.
        microbatches: of a domain in its turn.
        route: "trampoline" or "direct".
        trampolines: how many; None is as many as there are attention dies in a domain.
        shared: how many of the experts are replicas of a shared one.
    """

    attention: int = 4
    domains: int = 1
    microbatches: int = 1
    route: str = "trampoline"
    trampolines: int | None = None
    shared: int = 0

    @property
    def attention_dies(self) -> int:
        """Those of all domains."""
        return self.attention * self.domains

    def text(self, expert_dies: int) -> str:
        """For a headline."""
        domains = f"{self.domains} domains of " if self.domains > 1 else ""
        microbatches = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{domains}{self.attention} attention dies, {expert_dies} expert dies, {self.route}{microbatches}"


def add_deployment_options(parser: argparse.ArgumentParser) -> None:
    """Declare them; their defaults are those of `Deployment`."""
    default = Deployment()
    positive = whole_number(1)
    apart = parser.add_argument_group("attention and experts apart (a2e e2a), besides those above").add_argument
    apart("--attention", type=positive, metavar="N", default=default.attention,
          help="attention dies of each domain (default: 4); all other ranks are expert dies")  # fmt: skip
    apart("--domains", type=positive, metavar="N", default=default.domains,
          help="that take turns with the experts; an iteration is a turn of all (default: 1)")  # fmt: skip
    apart("--microbatches", type=whole_number(1, 3), metavar="N", default=default.microbatches,
          help="of a domain in its turn, of --tokens each (default: 1)")  # fmt: skip
    apart("--route", choices=("trampoline", "direct"), default=default.route, help="of the rows (default: trampoline)")
    apart("--trampolines", type=positive, metavar="N", help="how many (default: attention dies, if there are enough)")
    apart("--shared", type=whole_number(0), metavar="N", default=default.shared,
          help="experts that are replicas of a shared one, for every token besides (default: 0)")  # fmt: skip


def deployment_of(args: argparse.Namespace) -> Deployment:
    """The parsed options."""
    return Deployment(**{name: getattr(args, name) for name in Deployment.__dataclass_fields__})


def check_deployment(deployment: Deployment, *, ranks: int, experts: int, topk: int) -> None:
    """Check what can be known before any rank starts.

    Raises:
        UsageError: the numbers do not fit.
    """
    dies = ranks - deployment.attention_dies
    if dies < 1:
        raise UsageError(
            f"--ranks is {ranks}: {deployment.attention_dies} attention dies leave none for experts", value=ranks
        )
    if experts % dies:
        raise UsageError(f"--experts is {experts}: not a multiple of the {dies} expert dies", value=experts, bound=dies)
    if deployment.shared >= experts or topk > experts - deployment.shared:
        raise UsageError(
            f"--topk is {topk}: more than --experts ({experts}) without --shared ({deployment.shared})",
            value=topk, bound=experts - deployment.shared,
        )  # fmt: skip
    most = min(deployment.attention, dies)
    if deployment.trampolines is not None and (deployment.route == "direct" or deployment.trampolines > most):
        raise UsageError(
            f"--trampolines is {deployment.trampolines}: "
            + ("--route direct has none" if deployment.route == "direct" else f"at most {most} have something to do"),
            value=deployment.trampolines, bound=most,
        )  # fmt: skip
