"""A decision in words: what the curve said, what was believed, who raced, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from esper.contracts.decision import AdaptationDecision
from esper.contracts.run import FieldReport
from esper.services.tamiyo.calibration import Asked
from esper.services.tamiyo.config import TamiyoConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """One decision with all that belongs to it."""

    decision: AdaptationDecision
    """The decision."""
    rivals: tuple[AdaptationDecision, ...] = ()
    """The others of its race, in order."""
    reports: Mapping[str, FieldReport]
    """What became of them, by adaptation, as far as it has ended."""

    def lines(self, config: TamiyoConfig) -> list[str]:
        """Give all of it in words; ``config`` holds the thresholds that were compared with."""
        return [*self._decided(config), *self._seen(), *self._raced(), *self._ended()]

    def _decided(self, config: TamiyoConfig) -> Iterator[str]:
        one = self.decision
        verdict = "acted on" if one.actionable else "not acted on"
        yield f"{one.adaptation_id}, run {one.run_id}, epoch {one.epoch}: {one.adaptation_type.value}, {verdict}"
        yield one.explanation
        asked = Asked.of(one)
        before = "" if asked is None else f"{asked.raw:.2f} before calibration, "
        yield (
            f"confidence {one.confidence:.2f} ({before}threshold {config.confidence_threshold:g}), "
            f"urgency {one.urgency:.2f} (threshold {config.urgency_threshold:g})"
        )
        if asked is not None:
            yield f"earlier in this run {asked.helped} such decisions helped and {asked.fruitless} did not"
        if one.expected_reward is not None and one.exploration_bonus is not None:
            yield (
                f"expected to bring {one.expected_reward:+.4f} beyond its price; drawn {one.exploration_bonus:.4f} "
                "above that for being uncertain"
            )

    def _seen(self) -> Iterator[str]:
        yield f"curve: {self.decision.curve_state.value.replace('_', ' ')}"
        for figure in self.decision.evidence:
            detail = f" ({figure.detail})" if figure.detail else ""
            yield f"  {figure.name} = {figure.value:.4g}{detail}"

    def _raced(self) -> Iterator[str]:
        if not self.rivals:
            return
        yield f"raced against {len(self.rivals)}:"
        for rival in self.rivals:
            yield f"  {_name(rival)}: {_outcome(self.reports.get(rival.adaptation_id))}"

    def _ended(self) -> Iterator[str]:
        if self.decision.actionable:
            yield f"came to: {_outcome(self.reports.get(self.decision.adaptation_id))}"


def _name(decision: AdaptationDecision) -> str:
    what = decision.blueprint.name if decision.blueprint is not None else decision.adaptation_type.value
    return f"{what} at {decision.layer}" + (f" on the input of {decision.source}" if decision.source else "")


def _outcome(report: FieldReport | None) -> str:
    if report is None:
        return "no report yet"
    measured, price = report.contribution, report.price or 0.0
    figures = (
        f", brought {measured.estimate:+.4f} ({measured.low:+.4f} to {measured.high:+.4f}) at a price of {price:.4f}"
        if measured is not None
        else ""
    )
    return f"{report.outcome.name.lower().replace('_', ' ')}{figures}: {report.reason}"


def explain(
    decision: AdaptationDecision, together: Sequence[AdaptationDecision], reports: Sequence[FieldReport]
) -> Explanation:
    """Put together what belongs to a decision: ``together`` are all those on its packet, ``reports`` its run's."""
    rivals = tuple(one for one in together if one.adaptation_id != decision.adaptation_id)
    wanted = {one.adaptation_id for one in (decision, *rivals)}
    return Explanation(
        decision=decision,
        rivals=rivals,
        reports={one.adaptation_id: one for one in reports if one.adaptation_id in wanted},
    )
