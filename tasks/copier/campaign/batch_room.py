"""The room for the trees of one batch that are copied: those that do not fit are removed before any is filled."""

from __future__ import annotations

from tasks.copier.campaign.batch_trees import Trees
from tasks.copier.space.forecast import Forecast
from tasks.copier.space.room import Room


def reserve_room(made: Trees, room: Room) -> None:
    """Reserve what the trees will copy, as far as it is known. Trees without room fail with no_space.

    Raises ForkError for an error of the source, and OSError.
    """
    if not made.alive:
        return
    forecast = Forecast(made.alive[0].work, made.cloner, (), ())
    if not forecast.copies_any or room.take(forecast.allocated(made.plan.top.dev) * len(made.alive)):
        return
    each = sum(forecast.data_of(file).bytes for file in forecast.copied(made.plan.top.dev, made.ticker.poll))
    while made.alive and not room.take(each * len(made.alive)):
        last = made.alive[-1]
        made.fail(last, room.refusal(each, last.spec.destination, beside=each * (len(made.alive) - 1)))
