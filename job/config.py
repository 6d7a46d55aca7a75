"""The settings of a training run: all options, where their values come from, and how they are written to files.

In: a recipe (YAML, flat keys such as `optim.lr`) and the command line. The command line wins over the recipe, the
recipe over the defaults below. Out: a `Config`, and the flat dictionary that `config.yaml` and every checkpoint hold.
"""

import argparse
import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from job.tracking import tracker
from shards.command import Parser
from shards.errors import InputError, nearest
from shards.machine.files import write_whole

RECIPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes")


def setting(default: Any, help: str) -> Any:
    """A field of a dataclass, with the text that --help shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Model:
    """Settings of the network: `--model.*`."""

    layout: Literal["alexnet", "torchvision"] = setting(
        "alexnet", "sizes of the layers: the article's, with two groups; torchvision: those of its models.alexnet"
    )
    lrn: Literal["after-pool", "before-pool", "none"] = setting("after-pool", "place of local response normalisation")
    dropout: float = setting(
        0.5, "probability with which the outputs of fc6 and fc7 are dropped; layout torchvision: their inputs"
    )
    width: float = setting(1.0, "factor on the channels of every hidden layer")
    batch_norm: bool = setting(False, "batch normalisation of the convolutions' outputs and of the last pool's")
    classes: int = setting(0, "number of classes; 0: as many as the shards name")


@dataclass
class Optim:
    """Settings of the optimizer and the learning rate: `--optim.*`."""

    kind: Literal["sgd", "lars"] = setting("sgd", "sgd: with momentum; lars: a rate for each layer, for large batches")
    lr: float = setting(0.01, "learning rate of weights, before the schedule")
    lars_trust: float = setting(1e-3, "kind lars: share of a layer's norm that a step changes, at learning rate 1")
    momentum: float = setting(0.9, "momentum of SGD")
    weight_decay: float = setting(5e-4, "weight decay on weights; biases and batch normalisation have none")
    bias_lr: float = setting(2.0, "factor on the learning rate for biases and batch normalisation")
    new_lr: float = setting(1.0, "factor on the learning rate of fc8, which is often new after --init")
    schedule: Literal["step", "cosine", "poly", "constant"] = setting("step", "how the learning rate falls")
    step_epochs: int = setting(20, "schedule step: epochs between two drops")
    step_factor: float = setting(0.1, "schedule step: factor of one drop")
    poly_power: float = setting(2.0, "schedule poly: power of the part of the run that is left")
    warmup_epochs: float = setting(0.0, "epochs in which the rate rises linearly from near 0 to optim.lr")


@dataclass
class Data:
    """Settings of the training data: `--data.*`."""

    mirror: bool = setting(True, "mirror half of the training images, chosen at random")
    random_crop: bool = setting(True, "crop training images at a random place; false: the centre")
    window: int = setting(1024, "samples of a stream that are shuffled together; reads stay within it")
    streams: int = setting(64, "canonical streams that an epoch is cut into; best a multiple of the ranks")
    max_bad_fraction: float = setting(1e-3, "share of undecodable samples above which the run fails")


@dataclass
class Metrics:
    """Settings of the metrics: `--metrics.*`."""

    prices: str = setting(
        "", "file with grams_co2_per_kwh, for the CO2 of the energy; default job/scaling/prices.yaml, the example"
    )
    textfile: str = setting("", "file for the textfile collector of Prometheus' node_exporter, say DIR/train.prom")


@dataclass
class Config:
    """Every setting of a run. Option names have dashes: `max_steps` is `--max-steps`, `optim.lr` is `--optim.lr`."""

    recipe: str = setting("paper", "recipe: a name in job/recipes or a YAML file")
    data: str = setting("", "folder of shards that shards.pack or shards.index made; synthetic: noise, to time a run")
    out: str = setting("", "run directory; default runs/<recipe>")
    epochs: int = setting(65, "epochs to train")
    max_steps: int = setting(0, "stop after this many steps, even inside an epoch; 0: no limit")
    global_batch: int = setting(256, "images per step, over all ranks")
    seed: int = setting(1, "seed of initial weights, data order, crops, mirroring and dropout")
    workers: int = setting(-1, "reader processes per rank; -1: from the cores given to the job; 0: read in the rank")
    parallel: Literal["gradients", "weights", "hybrid"] = setting(
        "gradients",
        "what the ranks average: gradients before, or weights and momentum after the update; hybrid: gradients of the "
        "convolutions, with fc6 to fc8 split among the ranks",
    )
    average_every: int = setting(
        1, "parallel weights: steps between two averages; checkpoints, validations and stops wait for the next one"
    )
    wire: Literal["fp32", "fp16"] = setting(
        "fp32", "parallel gradients: type in which gradients travel; fp16 halves the bytes and rounds them"
    )
    init: str = setting(
        "",
        "file whose weights a new run begins with: a run directory or checkpoint of job.train, its safetensors export, "
        "or torchvision's AlexNet; fc8 begins anew where the classes differ; see resume",
    )
    freeze: Literal["none", "conv"] = setting(
        "none", "conv: conv1 to conv5 keep their weights, and batch normalisation its statistics; fc6 to fc8 learn"
    )
    resume: str = setting(
        "auto",
        "auto: newest good checkpoint of the run directory; none: start anew; or a checkpoint to go on from, with its "
        "step, momentum and order of samples (--init takes weights only); none and a file, like --init, count only "
        "while the run directory has no checkpoint",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU for each rank where there is one")
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32", "tf32: a GPU multiplies with 10 bits of mantissa; bf16: autocast to bfloat16; weights stay fp32"
    )
    kernels: Literal["auto", "plain", "fast"] = setting(
        "auto", "plain: PyTorch's own; fast: fused Triton kernels and CUDA graphs; auto: fast where the GPU has them"
    )
    deterministic: bool = setting(False, "the same seed gives the same bits on a GPU too, at some cost in speed")
    image_size: int = setting(227, "side of the square that is cropped for the network, in pixels; 67 or more")
    checkpoint_every: int = setting(
        0, "steps between checkpoints, besides those after a validation and at the end; 0: after each epoch"
    )
    checkpoint_keep: int = setting(3, "newest checkpoints that are kept, besides the best one")
    eval_every: int = setting(1, "epochs between validations; 0: none, and no validation shards are needed")
    commit_every: int = setting(50, "elastic training: steps between copies of the state that ranks go on from")
    log_every: int = setting(20, "steps between two lines of metrics")
    track: str = setting(
        "tensorboard",
        "where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, several with commas, or none",
    )
    timeline: bool = setting(False, "write Horovod's timeline to timeline.json of the run directory (chrome://tracing)")
    profile: int = setting(0, "steps of rank 0 to trace with torch's profiler, into profile.json of the run directory")
    profile_nvtx: bool = setting(
        False, "mark data, forward, backward, allreduce and update of each step for NVIDIA's profiler nsys"
    )
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    stream: Data = field(default_factory=Data, metadata={"prefix": "data"})
    metrics: Metrics = field(default_factory=Metrics)


# Schedules whose rate depends on the length of the run: under them `epochs` cannot change.
SCHEDULES_TO_THE_END = ("cosine", "poly")

# Settings without effect unless another one has one of these values.
ONLY_WITH = {
    "wire": ("parallel", ("gradients",)),
    "average-every": ("parallel", ("weights",)),
    "optim.lars-trust": ("optim.kind", ("lars",)),
    "optim.step-epochs": ("optim.schedule", ("step",)),
    "optim.step-factor": ("optim.schedule", ("step",)),
    "optim.poly-power": ("optim.schedule", ("poly",)),
}

# Settings that may change when a run is resumed: none of them changes what is computed at a given step. `epochs` may
# change, too, except with SCHEDULES_TO_THE_END. Device and kernels decide how sums are rounded and which units dropout
# drops: when they change, that is reported.
MAY_CHANGE = frozenset(
    "recipe data out max-steps workers init resume device checkpoint-every checkpoint-keep eval-every commit-every "
    "log-every track kernels timeline profile profile-nvtx metrics.prices metrics.textfile "
    "data.max-bad-fraction".split()
)


def _leaves() -> dict[str, tuple[str, dataclasses.Field]]:
    """Option name -> (group attribute or "", field), in the order of the help."""
    leaves = {}
    for outer in dataclasses.fields(Config):
        if dataclasses.is_dataclass(outer.type):
            prefix = outer.metadata.get("prefix", outer.name)
            for inner in dataclasses.fields(outer.type):
                leaves[f"{prefix}.{inner.name}".replace("_", "-")] = (outer.name, inner)
        else:
            leaves[outer.name.replace("_", "-")] = ("", outer)
    return leaves


LEAVES = _leaves()


def convert(name: str, value: Any, where: str) -> Any:
    """`value`, from YAML or the command line, in the type of setting `name`. Raises InputError naming `where`."""
    kind = LEAVES[name][1].type
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{where}: {name} is {value!r}; it is one of {', '.join(choices)}")
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int:
            if isinstance(value, float) and not value.is_integer() or isinstance(value, bool):
                raise ValueError
            return int(value)
        if value is None or isinstance(value, bool | list | dict):
            raise ValueError
        return kind(value)  # float also takes YAML's strings such as 1e-3
    except (KeyError, TypeError, ValueError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise InputError(f"{where}: {name} is {value!r}; it must be {wanted}") from None


def read_flat(path: str) -> dict[str, Any]:
    """Settings of a recipe or of a run's config.yaml: flat keys, dashes or underscores, values of the right type.

    Raises:
        InputError: unreadable file, or a key that no setting has (the nearest one is named).
    """
    import yaml  # only here and where it is written: --help works in a Python without packages

    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} must hold lines such as `optim.lr: 0.01`")
    values = {}
    for key, value in fields.items():
        name = str(key).replace("_", "-")
        if name not in LEAVES:
            raise InputError(f"{path}: unknown setting {key}{nearest(name, list(LEAVES))}")
        values[name] = convert(name, value, path)
    return values


def recipe_path(recipe: str) -> str:
    """Path of a recipe given by name or by path. Raises InputError with the existing names."""
    if recipe.endswith((".yaml", ".yml")):
        if not os.path.isfile(recipe):
            raise InputError(f"no recipe file {recipe}")
        return recipe
    names = sorted(entry.removesuffix(".yaml") for entry in os.listdir(RECIPES) if entry.endswith(".yaml"))
    if recipe not in names:
        close = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"no recipe {recipe!r}; {hint}there are {', '.join(names)}, or give a .yaml file")
    return os.path.join(RECIPES, f"{recipe}.yaml")


def parser(prog: str, description: str) -> Parser:
    """Parser with one option per setting; options that are not given are missing in its result."""
    result = Parser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        epilog="Values come from the recipe unless given here; defaults shown are those where the recipe is silent.",
    )
    for name, (_, leaf) in LEAVES.items():
        kind = leaf.type
        metavar = {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(kind) or "|".join(typing.get_args(kind))
        default = "" if leaf.default == "" else f" [{str(leaf.default).lower()}]"
        # A text here; `convert` converts it, so that recipe and command line have the same errors.
        text = leaf.metadata["help"].replace("%", "%%") + default
        bare = {"nargs": "?", "const": "true"} if kind is bool else {}
        result.add_argument(f"--{name}", dest=name, metavar=metavar, help=text, **bare)
    return result


def parse(arguments: list[str] | None, prog: str, description: str) -> Config:
    """The run's settings: defaults, then the recipe, then `arguments`. Raises InputError."""
    given = vars(parser(prog, description).parse_args(arguments))
    given = {name: convert(name, value, "command line") for name, value in given.items()}
    recipe = read_flat(recipe_path(given.get("recipe", Config().recipe)))
    config = from_flat({**recipe, **given})
    if not config.out:
        config.out = os.path.join("runs", os.path.basename(config.recipe).removesuffix(".yaml"))
    check(config)
    refuse_ignored(to_flat(config), given, recipe)
    return config


def from_flat(values: dict[str, Any], where: str = "settings") -> Config:
    """Config with the settings of `values` (option names); the rest are defaults. Raises InputError naming `where`."""
    config = Config()
    if not isinstance(values, dict):
        raise InputError(f"{where} holds no settings of job.train")
    for name, value in values.items():
        if name not in LEAVES:
            raise InputError(
                f"{where} has a setting {name!r} that this version does not know; use the version it is of"
            )
        group, leaf = LEAVES[name]
        setattr(getattr(config, group) if group else config, leaf.name, convert(name, value, where))
    return config


def refuse_ignored(flat: dict[str, Any], given: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Raise InputError for a setting that was given, is not the default, and would have no effect.

    Except for one of the recipe that the command line made ineffective: `--recipe large-batch --optim.kind sgd`.
    """
    defaults = to_flat(Config())
    for name, (other, values) in ONLY_WITH.items():
        mine = name in given or name in recipe and other not in given
        if mine and flat[name] != defaults[name] and flat[other] not in values:
            raise InputError(
                f"--{name} {flat[name]} has no effect with --{other} {flat[other]}, only with {' or '.join(values)}; "
                "leave it out"
            )


def with_classes(config: Config, classes: int) -> Config:
    """The same settings for a network with `classes` outputs."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, classes=classes))


def to_flat(config: Config) -> dict[str, Any]:
    """Every setting by option name, as config.yaml holds them."""
    return {
        name: getattr(getattr(config, group) if group else config, leaf.name) for name, (group, leaf) in LEAVES.items()
    }


def check(config: Config) -> None:
    """Raise InputError for an invalid value."""
    if not config.data:
        raise InputError("--data is missing: give the folder of shards that python -m shards.pack wrote")
    limits = [
        ("image-size", config.image_size >= 67, "67 or more: smaller images do not survive the layers"),
        ("global-batch", config.global_batch >= 1, "1 or more"),
        ("epochs", config.epochs >= 1, "1 or more"),
        ("max-steps", config.max_steps >= 0, "0 or more"),
        ("workers", config.workers >= -1, "-1 or more"),
        ("seed", 0 <= config.seed < 2**63, "between 0 and 2**63 - 1"),
        ("average-every", config.average_every >= 1, "1 or more"),
        ("checkpoint-every", config.checkpoint_every >= 0, "0 or more"),
        ("checkpoint-keep", config.checkpoint_keep >= 1, "1 or more"),
        ("eval-every", config.eval_every >= 0, "0 or more"),
        ("commit-every", config.commit_every >= 1, "1 or more"),
        ("log-every", config.log_every >= 1, "1 or more"),
        ("profile", config.profile >= 0, "0 or more"),
        ("model.dropout", 0 <= config.model.dropout < 1, "from 0 to below 1"),
        ("model.width", 0 < config.model.width <= 16, "above 0, up to 16"),
        ("model.classes", config.model.classes >= 0, "0 or more"),
        ("optim.lr", 0 <= config.optim.lr < float("inf"), "0 or more"),
        ("optim.new-lr", 0 < config.optim.new_lr < float("inf"), "above 0"),
        ("optim.lars-trust", 0 < config.optim.lars_trust < float("inf"), "above 0"),
        ("optim.momentum", 0 <= config.optim.momentum < 1, "from 0 to below 1"),
        ("optim.weight-decay", 0 <= config.optim.weight_decay < float("inf"), "0 or more"),
        ("optim.step-epochs", config.optim.step_epochs >= 1, "1 or more"),
        ("optim.poly-power", 0 < config.optim.poly_power < float("inf"), "above 0"),
        ("optim.warmup-epochs", 0 <= config.optim.warmup_epochs < float("inf"), "0 or more"),
        ("data.window", config.stream.window >= 1, "1 or more"),
        ("data.streams", config.stream.streams >= 1, "1 or more"),
        ("data.max-bad-fraction", 0 <= config.stream.max_bad_fraction <= 1, "from 0 to 1"),
    ]
    for name, good, wanted in limits:
        if not good:
            raise InputError(f"--{name} is {to_flat(config)[name]}; it must be {wanted}")
    if config.init and config.resume not in ("auto", "none"):
        raise InputError(
            "--init and --resume FILE both say what a run begins with; give --init to begin at step 0 with the weights "
            "of a file, or --resume to go on with its step and momentum"
        )
    if config.model.layout == "torchvision" and (config.model.lrn != "none" or config.model.batch_norm):
        raise InputError(
            "--model.layout torchvision has no LRN and no batch normalisation; add --model.lrn none "
            "--model.batch-norm false, or use --recipe torchvision"
        )
    tracker.parse(config.track)
    if config.parallel == "hybrid" and config.optim.kind == "lars":
        raise InputError(
            "LARS needs the norm of a whole layer, and with --parallel hybrid no rank has one; use gradients"
        )
    if config.parallel == "weights" and config.optim.kind == "lars":
        raise InputError(
            "--parallel weights averages the weights after each rank's update, and that of LARS is not linear in the "
            "gradient; use --parallel gradients, or --optim.kind sgd"
        )


def write_yaml(values: dict[str, Any], path: str) -> None:
    """Write flat settings as YAML, in the order of the help."""
    import yaml

    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
