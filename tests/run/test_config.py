"""Settings: the command line wins over the recipe, mistakes are named with their nearest correction."""

import subprocess
import sys

import pytest
import yaml

from job import config
from shards.errors import InputError


def parse(*arguments: str) -> config.Config:
    return config.parse([*arguments], "job.train", "test")


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("global-batch: 96\noptim.lr: 1e-3\nmodel.dropout: 0.25\ndata.mirror: false\n")
    got = parse("--recipe", str(recipe), "--data", "d", "--optim.lr", "0.5", "--data.window=8")
    assert (got.global_batch, got.optim.lr, got.model.dropout, got.stream.mirror) == (96, 0.5, 0.25, False)
    assert got.stream.window == 8 and got.out == "runs/mine"


def test_the_recipes_are_the_published_training():
    paper = parse("--recipe", "paper", "--data", "d")
    assert (paper.global_batch, paper.epochs, paper.image_size, paper.seed) == (256, 65, 227, 1)
    assert (paper.optim.lr, paper.optim.momentum, paper.optim.weight_decay, paper.optim.bias_lr) == (0.01, 0.9, 5e-4, 2)
    assert (paper.optim.schedule, paper.optim.step_epochs, paper.optim.step_factor) == ("step", 20, 0.1)
    krizhevsky = config.to_flat(parse("--recipe", "krizhevsky", "--data", "d"))
    differing = {k for k, v in config.to_flat(paper).items() if krizhevsky[k] != v}
    assert differing == {"recipe", "out", "model.lrn"} and krizhevsky["model.lrn"] == "before-pool"


def test_settings_survive_being_written_and_read(tmp_path):
    original = parse("--data", "d", "--optim.lr", "3e-7", "--resume", "none")
    config.write_yaml(config.to_flat(original), str(tmp_path / "config.yaml"))
    assert config.from_flat(config.read_flat(str(tmp_path / "config.yaml"))) == original
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == list(config.LEAVES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "papr", "--data", "d"], ["'papr'", "did you mean paper?"]),
        (["--recipe", "none.yaml", "--data", "d"], ["no recipe file none.yaml"]),
        (["--data", "d", "--global_bach", "3"], ["--global_bach", "did you mean --global-batch?"]),
        (["--data", "d", "extra"], ["unknown argument extra"]),
        (["--data", "d", "--epochs", "many"], ["epochs is 'many'", "whole number"]),
        (["--data", "d", "--epochs", "2.5"], ["epochs is '2.5'", "whole number"]),
        (["--data", "d", "--epochs", "0"], ["--epochs is 0", "1 or more"]),
        (["--data", "d", "--optim.lr", "nan"], ["--optim.lr is nan"]),
        (["--data", "d", "--parallel", "magic"], ["parallel is 'magic'", "gradients, weights"]),
        (["--data", "d", "--recipe", "large-batch", "--parallel", "weights"], ["--parallel weights", "not linear"]),
        (["--data", "d", "--optim.lars-trust", "0"], ["--optim.lars-trust is 0", "above 0"]),
        (["--data", "d", "--image-size", "66"], ["--image-size is 66", "67 or more"]),
        (["--data", "d", "--data.mirror", "maybe"], ["data.mirror is 'maybe'", "true or false"]),
        (["--data", "d", "--parallel", "weights", "--wire", "fp16"], ["--wire fp16", "no effect", "gradients"]),
        (["--data", "d", "--parallel", "hybrid", "--wire", "fp16"], ["--wire fp16", "--parallel hybrid"]),
        (["--data", "d", "--average-every", "4"], ["--average-every 4", "--parallel gradients", "only with weights"]),
        (["--data", "d", "--optim.lars-trust", "0.01"], ["--optim.lars-trust 0.01", "--optim.kind sgd", "lars"]),
        (["--data", "d", "--optim.poly-power", "3"], ["--optim.poly-power 3.0", "--optim.schedule step", "poly"]),
        (["--data", "d", "--recipe", "demo", "--optim.step-epochs", "3"], ["--optim.step-epochs 3", "cosine"]),
        (["--data", "d", "--recipe", "demo", "--optim.step-factor", "0.5"], ["--optim.step-factor 0.5", "cosine"]),
        ([], ["--data is missing"]),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words):
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_without_effect_is_refused_only_if_the_user_gave_it(tmp_path):
    assert parse("--data", "d", "--wire", "fp32", "--parallel", "weights").wire == "fp32"  # the default
    assert parse("--data", "d", "--wire", "fp16").wire == "fp16"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim.kind: lars\noptim.lars-trust: 0.01\n")
    assert parse("--data", "d", "--recipe", str(recipe), "--optim.kind", "sgd").optim.kind == "sgd"
    recipe.write_text("optim.lars-trust: 0.01\n")
    with pytest.raises(InputError, match="--optim.lars-trust 0.01 has no effect with --optim.kind sgd"):
        parse("--data", "d", "--recipe", str(recipe))


def test_an_unknown_key_of_a_recipe_is_named_with_its_file(tmp_path):
    recipe = tmp_path / "odd.yaml"
    recipe.write_text("model.droput: 0.5\n")
    with pytest.raises(InputError, match=r"odd.yaml: unknown setting model.droput; did you mean model.dropout\?"):
        parse("--recipe", str(recipe), "--data", "d")
    recipe.write_text("- a list\n")
    with pytest.raises(InputError, match="must hold lines such as"):
        parse("--recipe", str(recipe), "--data", "d")
    recipe.write_text("a: [\n")
    with pytest.raises(InputError, match="cannot read"):
        parse("--recipe", str(recipe), "--data", "d")


@pytest.mark.parametrize(
    "module", ["job.train", "job.evaluate", "job.export", "job.predict", "job.look", "job.bench", "job.doctor"]
)
def test_help_comes_without_loading_torch(module):
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        f"except SystemExit as e: assert e.code == 0\n"
        f"assert not {{'torch', 'horovod', 'webdataset', 'mpi4py'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
