"""What training costs, rented or bought: an epoch, a trained network, an experiment a day; and what a deadline changes.

In: a file of prices (job/scaling/prices.yaml is the example) and hours of a run by number of GPUs. Out: rows of the
report's tables.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from shards.errors import InputError, nearest

EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prices.yaml")
HOURS_A_YEAR = 8760
KINDS = ("on_demand", "reserved", "spot")


@dataclasses.dataclass(frozen=True)
class Cloud:
    name: str
    gpus_per_node: int
    on_demand: float = math.nan  # a GPU-hour; nan: not offered
    reserved: float = math.nan
    spot: float = math.nan
    interruptions_per_node_hour: float = 0.0  # of spot nodes
    speed: float = 1.0  # images/s of this GPU / those of the study's
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Own:
    name: str
    nodes: int
    gpus_per_node: int
    node_price: float
    years: float
    node_kw: float
    pue: float
    kwh_price: float
    staff_per_year: float
    utilisation: float
    speed: float = 1.0
    source: str = ""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def fixed_per_year(self) -> float:
        """Purchase and staff, whether the machines compute or not."""
        return self.nodes * self.node_price / self.years + self.staff_per_year

    @property
    def energy_per_gpu_hour(self) -> float:
        return self.node_kw / self.gpus_per_node * self.pue * self.kwh_price

    def gpu_hour(self, utilisation: float) -> float:
        """Cost of an hour in which a GPU computes."""
        return self.fixed_per_year / (self.gpus * HOURS_A_YEAR * utilisation) + self.energy_per_gpu_hour

    def break_even(self, price: float) -> float:
        """Utilisation above which owning is cheaper than renting at `price` a GPU-hour; inf: never."""
        saved = price - self.energy_per_gpu_hour
        return self.fixed_per_year / (self.gpus * HOURS_A_YEAR) / saved if saved > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Prices:
    path: str
    currency: str
    date: str
    source: str
    cloud: tuple[Cloud, ...]
    own: tuple[Own, ...]
    checkpoint_minutes: float
    restart_minutes: float
    deadlines_hours: tuple[float, ...]

    @property
    def example(self) -> bool:
        return os.path.realpath(self.path) == os.path.realpath(EXAMPLE)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to train: so many GPUs of an offer."""

    offer: str
    gpus: int
    hours: float  # of the whole run, interruptions included
    price: float  # a GPU-hour
    cost: float  # of the whole run


def load_prices(path: str) -> Prices:
    """Read a file of prices. Raises InputError that names the offer and the field."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}; job/scaling/prices.yaml is an example") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no prices; job/scaling/prices.yaml is an example")
    known = [field.name for field in dataclasses.fields(Prices) if field.name != "path"]
    for key in fields:
        if key not in known:
            raise InputError(f"{path}: unknown field {key}{nearest(str(key), known)}")
    return Prices(
        path,
        str(fields.get("currency", "USD")),
        str(fields.get("date", "no date")),
        str(fields.get("source", "no source")),
        tuple(_offer(Cloud, entry, path) for entry in fields.get("cloud") or ()),
        tuple(_offer(Own, entry, path) for entry in fields.get("own") or ()),
        _number(fields.get("checkpoint_minutes", 15), f"{path}: checkpoint_minutes"),
        _number(fields.get("restart_minutes", 5), f"{path}: restart_minutes"),
        tuple(_number(h, f"{path}: deadlines_hours") for h in fields.get("deadlines_hours") or (24,)),
    )


def _offer(kind: type, entry: Any, path: str):
    if not isinstance(entry, dict) or not entry.get("name"):
        raise InputError(f"{path}: an offer has no name")
    where = f"{path}: {entry['name']}"
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for key, value in entry.items():
        if key not in fields:
            raise InputError(f"{where}: unknown field {key}{nearest(str(key), list(fields))}")
        values[key] = str(value) if fields[key].type is str else _number(value, f"{where}: {key}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: {key} is missing")
        if key in ("nodes", "gpus_per_node", "years", "utilisation", "speed") and not values.get(key, 1) > 0:
            raise InputError(f"{where}: {key} must be above 0")
        if key in ("nodes", "gpus_per_node"):
            values[key] = int(values[key])
    if values.get("utilisation", 1) > 1:
        raise InputError(f"{where}: utilisation is a share, at most 1")
    return kind(**values)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{where} is {value!r}; it must be a number, 0 or more")
    return float(value)


def choices(prices: Prices, hours: dict[int, float]) -> list[Choice]:
    """All ways to make a run that takes `hours` by number of GPUs, the cheapest first."""
    found = []
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
                found.append(Choice(f"{offer.name}, {kind.replace('_', ' ')}", gpus, real, price, cost))
    for own in prices.own:
        price = own.gpu_hour(own.utilisation)
        for gpus, time in hours.items():
            if gpus <= own.gpus:
                real = time / own.speed
                found.append(Choice(own.name, gpus, real, price, gpus * real * price))
    return sorted(found, key=lambda choice: choice.cost)


def cheapest_by_offer(found: Sequence[Choice]) -> list[Choice]:
    """The cheapest number of GPUs of each offer, the cheapest offer first."""
    best: dict[str, Choice] = {}
    for choice in found:
        best.setdefault(choice.offer, choice)
    return list(best.values())


def by_deadline(found: Sequence[Choice], deadlines: Sequence[float]) -> list[tuple[float, Choice | None]]:
    """The cheapest choice that ends within each deadline, in hours; None: none does."""
    return [(limit, next((c for c in found if c.hours <= limit), None)) for limit in deadlines]


@dataclasses.dataclass(frozen=True)
class Yearly:
    """An experiment (one trained network) every day: its cost, rented and bought."""

    offer: str
    per_experiment: float
    note: str


def experiment_a_day(prices: Prices, found: Sequence[Choice]) -> list[Yearly]:
    """Cost of an experiment when one is made each day of the year, with runs that end within the day.

    Own machines are then paid for by these experiments alone: that is their cost at this utilisation.
    """
    within = [choice for choice in found if choice.hours <= 24]
    own = {machine.name: machine for machine in prices.own}
    rows = []
    for choice in cheapest_by_offer(within):
        if machine := own.get(choice.offer):
            busy = choice.gpus * choice.hours
            cost = machine.fixed_per_year / 365 + busy * machine.energy_per_gpu_hour
            share = busy / (machine.gpus * 24)
            note = f"{choice.gpus} of {machine.gpus} GPUs for {choice.hours:.1f} h: {share:.0%} of the machines' time"
            rows.append(Yearly(choice.offer, cost, note))
        else:
            rows.append(Yearly(choice.offer, choice.cost, f"{choice.gpus} GPUs for {choice.hours:.1f} h"))
    return sorted(rows, key=lambda row: row.per_experiment)
