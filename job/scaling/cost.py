"""What training costs, rented or bought: per epoch, per trained network, per day; and what a deadline changes.

In: a file of prices (job/scaling/prices.yaml is the example), and the hours of a training by number of GPUs. Out: rows
of the report's tables.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import yaml

from shards.errors import InputError, nearest

EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prices.yaml")
HOURS_PER_YEAR = 8760
KINDS = ("on_demand", "reserved", "spot")


@dataclasses.dataclass(frozen=True)
class Cloud:
    """GPUs for rent, in whole nodes. Prices are per GPU-hour; nan: not offered."""

    name: str
    gpus_per_node: int
    on_demand: float = math.nan
    reserved: float = math.nan
    spot: float = math.nan
    interruptions_per_node_hour: float = 0.0  # of spot nodes
    speed: float = 1.0  # images/s of this GPU / those of the study's
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Own:
    """GPUs to buy."""

    name: str
    nodes: int
    gpus_per_node: int
    node_price: float
    years: float  # of use
    node_kw: float
    pue: float  # power of the room / power of the machines
    kwh_price: float
    staff_per_year: float
    utilisation: float  # share of the year in which the machines compute
    speed: float = 1.0
    source: str = ""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def fixed_per_year(self) -> float:
        """Purchase and staff, whether the machines compute or not."""
        return self.nodes * self.node_price / self.years + self.staff_per_year

    @property
    def energy_per_gpu_hour(self) -> float:
        """Cost of the energy of an hour in which a GPU computes."""
        return self.node_kw / self.gpus_per_node * self.pue * self.kwh_price

    def gpu_hour(self, utilisation: float) -> float:
        """Whole cost of an hour in which a GPU computes."""
        return self.fixed_per_year / (self.gpus * HOURS_PER_YEAR * utilisation) + self.energy_per_gpu_hour

    def break_even(self, price: float) -> float:
        """Utilisation above which owning is cheaper than renting at `price` per GPU-hour; inf: never."""
        saved = price - self.energy_per_gpu_hour
        return self.fixed_per_year / (self.gpus * HOURS_PER_YEAR) / saved if saved > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Prices:
    """A file of prices."""

    path: str
    currency: str = "USD"
    date: str = "no date"
    source: str = "no source"
    cloud: tuple[Cloud, ...] = ()
    own: tuple[Own, ...] = ()
    checkpoint_minutes: float = 15  # between checkpoints: a lost spot node costs half of that
    restart_minutes: float = 5
    deadlines_hours: tuple[float, ...] = (24,)
    grams_co2_per_kwh: float = math.nan  # of the electricity used; nan: not known

    @property
    def example(self) -> bool:
        """Whether these are the invented prices of this repository."""
        return os.path.realpath(self.path) == os.path.realpath(EXAMPLE)


def load_prices(path: str) -> Prices:
    """Read a file of prices. Raises InputError that names the offer and the field."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}; job/scaling/prices.yaml is an example") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no prices; job/scaling/prices.yaml is an example")
    for name, kind in (("cloud", Cloud), ("own", Own)):
        offers = []
        for entry in fields.get(name) or ():
            if not isinstance(entry, dict) or not entry.get("name"):
                raise InputError(f"{path}: an offer has no name")
            offers.append(_checked(kind, entry, f"{path}: {entry['name']}"))
        fields[name] = tuple(offers)
    deadlines = fields.get("deadlines_hours") or Prices.deadlines_hours
    fields["deadlines_hours"] = tuple(_number(hours, f"{path}: deadlines_hours") for hours in deadlines)
    return _checked(Prices, fields, path, path=path)


def _checked(kind: type, entry: dict[str, Any], where: str, **given: Any) -> Any:
    """A dataclass `kind` of the fields of `entry`, each checked by its type."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = dict(given)
    for key, value in entry.items():
        if key not in fields or key in given:
            raise InputError(f"{where}: unknown field {key}{nearest(str(key), list(fields))}")
        of_type = fields[key].type
        values[key] = _number(value, f"{where}: {key}") if of_type in (int, float) else value
        values[key] = of_type(values[key]) if of_type in (int, str) else values[key]
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: {key} is missing")
        if key in ("nodes", "gpus_per_node", "years", "utilisation", "speed") and not values.get(key, 1) > 0:
            raise InputError(f"{where}: {key} must be above 0")
    if values.get("utilisation", 1) > 1:
        raise InputError(f"{where}: utilisation is a share, at most 1")
    return kind(**values)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{where} is {value!r}; it must be a number, 0 or more")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to train: a number of GPUs of an offer."""

    offer: str
    gpus: int
    hours: float  # of the whole training, interruptions included
    price: float  # per GPU-hour
    cost: float  # of the whole training
    kwh: float = math.nan  # of the whole training; nan: not measured
    co2_kg: float = math.nan


def choices(prices: Prices, hours: dict[int, float], kwh: dict[int, float] | None = None) -> list[Choice]:
    """All ways to make a training that takes `hours` by number of GPUs, the cheapest first.

    Args:
        kwh: energy of the training by number of GPUs, where it is known. It is that of the study's machines: of offers
            with other GPUs (`speed` is not 1) it is not known.
    """
    found = []

    def add(offer: Cloud | Own, name: str, gpus: int, real: float, price: float, cost: float) -> None:
        # Hours that are lost when nodes are lost draw energy as well.
        energy = (kwh or {}).get(gpus, math.nan) * real / hours[gpus] if offer.speed == 1 else math.nan
        found.append(Choice(name, gpus, real, price, cost, energy, energy * prices.grams_co2_per_kwh / 1000))

    for offer in prices.cloud:
        for kind in KINDS:
            price = getattr(offer, kind)
            if math.isnan(price):
                continue
            for gpus, time in hours.items():
                nodes = math.ceil(gpus / offer.gpus_per_node)
                real = time / offer.speed
                if kind == "spot":
                    lost = (prices.checkpoint_minutes / 2 + prices.restart_minutes) / 60
                    left = 1 - offer.interruptions_per_node_hour * nodes * lost  # share of the time that counts
                    if left <= 0:
                        continue
                    real /= left
                cost = nodes * offer.gpus_per_node * real * price
                add(offer, f"{offer.name}, {kind.replace('_', ' ')}", gpus, real, price, cost)
    for own in prices.own:
        price = own.gpu_hour(own.utilisation)
        for gpus, time in hours.items():
            if gpus <= own.gpus:
                real = time / own.speed
                add(own, own.name, gpus, real, price, gpus * real * price)
    return sorted(found, key=lambda choice: choice.cost)


def cheapest_by_offer(found: Sequence[Choice]) -> list[Choice]:
    """The cheapest number of GPUs of each offer, the cheapest offer first."""
    best: dict[str, Choice] = {}
    for choice in found:
        best.setdefault(choice.offer, choice)
    return list(best.values())


def by_deadline(found: Sequence[Choice], deadlines: Sequence[float]) -> list[tuple[float, Choice | None]]:
    """The cheapest choice that ends within each deadline, in hours; None: no choice does."""
    return [(limit, next((c for c in found if c.hours <= limit), None)) for limit in deadlines]


@dataclasses.dataclass(frozen=True)
class Daily:
    """Cost of an experiment (one trained network) when one is made every day."""

    offer: str
    per_experiment: float
    note: str


def experiment_a_day(prices: Prices, found: Sequence[Choice]) -> list[Daily]:
    """Cost of an experiment when one is made each day of the year, with trainings that end within the day.

    Own machines are then paid for by these experiments alone: it is their cost at this utilisation.
    """
    own = {machine.name: machine for machine in prices.own}
    rows = []
    for choice in cheapest_by_offer([choice for choice in found if choice.hours <= 24]):
        cost, note = choice.cost, f"{choice.gpus} GPUs for {choice.hours:.1f} h"
        if machine := own.get(choice.offer):
            busy = choice.gpus * choice.hours
            cost = machine.fixed_per_year / 365 + busy * machine.energy_per_gpu_hour
            share = busy / (machine.gpus * 24)
            note = f"{choice.gpus} of {machine.gpus} GPUs for {choice.hours:.1f} h: {share:.0%} of the machines' time"
        rows.append(Daily(choice.offer, cost, note))
    return sorted(rows, key=lambda row: row.per_experiment)


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """Utilisation of own machines above which they are cheaper than an offer; above 1: never."""

    own: str
    offer: str
    utilisation: float


def break_even(prices: Prices) -> list[BreakEven]:
    """Own machines against each price of each rented offer, where energy alone does not cost more than renting."""
    rows = []
    for own in prices.own:
        for offer in prices.cloud:
            for kind in KINDS:
                limit = own.break_even(getattr(offer, kind))  # inf for a price that is not offered, too
                if math.isfinite(limit):
                    rows.append(BreakEven(own.name, f"{offer.name}, {kind.replace('_', ' ')}", limit))
    return rows
