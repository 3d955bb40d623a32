"""What is said before the first step where a step does not fit into memory."""

import jax
import pytest
import test_config

from clsl_jax import cluster, compiled, experiment, train_state
from clsl_jax.compiled import compile_steps, largest_that_fits
from clsl_jax.errors import InputError

SMALL = {
    "data.sizes": (64, 8, 8),
    "batch_size": 64,
    "evaluation.batch_size": 8,
    "model.widths": (4, 8),
    "model.encoder_layers": 0,
    "model.rank": 4,
}


@pytest.mark.parametrize("fixed", [0, 500])
@pytest.mark.parametrize("room", [600, 777, 1200, 3199])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_the_largest_batch_is_found_in_few_compilations(fixed, room, multiple):
    asked = []

    def peak(batch_size):
        asked.append(batch_size)
        return fixed + 50 * batch_size

    found = largest_that_fits(peak, room, failed=(64, peak(64)), multiple=multiple)
    best = max((n for n in range(0, 65, multiple) if fixed + 50 * n <= room), default=0)
    assert found == best
    assert len(asked) <= 8
    if not best:
        assert asked == [64, multiple]


def test_a_peak_that_is_no_straight_line_costs_compilations_but_not_rightness():
    found = largest_that_fits(lambda n: n * n, 1000, failed=(64, 64 * 64), multiple=1)
    assert found == 31


@pytest.mark.parametrize("along_model", [1, 2])
def test_building_and_starting_trace_the_initialization_once(tmp_path, monkeypatch, along_model):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    traced, init_state = [], train_state.init_state

    def counted(*given, **named):
        traced.append(1)
        return init_state(*given, **named)

    monkeypatch.setattr(train_state, "init_state", counted)
    config = test_config.load("scenes")
    config.update_from_flattened_dict({**SMALL, "mesh.model": along_model})
    experiment.build(config).new_state(lambda line: None)
    assert len(traced) == 1


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    config = test_config.load("scenes")
    config.update_from_flattened_dict({**SMALL, "model.srfl": False, "model.sgfe": False})
    built = experiment.build(config)
    needed = compiled._peak(compile_steps(built, config).train)
    # Beside what it takes itself the full labels, and two batches: images, augmented and not, rows.
    needed += built.abstract_state.annotations.size // jax.device_count()
    needed += 2 * 64 // jax.device_count() * (2 * 64 * 64 * 3 + 4)
    config.memory_gb = needed / 2**30
    compile_steps(built, config)
    config.memory_gb = (needed - 1) / 2**30
    said = []
    with pytest.raises(InputError, match=r"^batch_size=64 needs 0\.\d+ GiB of a device") as refused:
        compile_steps(built, config, report=said.append)
    assert "optim.accumulate=2" in str(refused.value)
    assert said[-1] == "train_step does not fit; looking for the largest batch_size that does ..."
    fits = int(str(refused.value).partition("that fits is ")[2].partition(".")[0])
    assert fits % 8 == 0
    assert 0 < fits < 64
    config.batch_size = fits
    compile_steps(experiment.build(config), config)


def test_an_evaluation_that_does_not_fit_beside_the_run_is_refused_likewise(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    config = test_config.load("scenes")
    config.update_from_flattened_dict({**SMALL, "evaluation.batch_size": 2048})
    built = experiment.build(config)
    found = compile_steps(built, config).predict.memory_analysis()
    # Beside what it takes itself all of the state, the full labels to count with, another batch.
    state = built.new_state(lambda line: None)
    held = (*jax.tree.leaves(state), state.annotations)
    needed = sum(array.addressable_shards[0].data.nbytes for array in held)
    needed += found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    images = 2048 // jax.device_count() * 64 * 64 * 3
    assert found.argument_size_in_bytes > images
    needed += images
    config.memory_gb = needed / 2**30
    compile_steps(built, config)
    config.memory_gb = (needed - 1) / 2**30
    with pytest.raises(InputError, match=r"^evaluation\.batch_size=2048 needs 0\.\d+") as refused:
        compile_steps(built, config)
    assert "Or choose model.dtype=bfloat16, or use fewer cpu_devices, or" in str(refused.value)
    fits = int(str(refused.value).partition("that fits is ")[2].partition(".")[0])
    assert 1024 < fits < 2048
    with pytest.raises(InputError, match=rf"that fits is {fits}\. Or use fewer cpu_devices"):
        compile_steps(built, config, training=False)
    config.evaluation.batch_size = fits
    compile_steps(experiment.build(config), config)


def test_a_recovery_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    config = test_config.load("scenes")
    config.update_from_flattened_dict(SMALL)
    built = experiment.build(config)
    peak = compiled._peak

    def larger(function):
        return peak(function) + 2**30 * ("recover" in function.as_text()[:99])

    monkeypatch.setattr(compiled, "_peak", larger)
    config.memory_gb = 0.9
    with pytest.raises(InputError, match=r"^Recovering 64 x 20 labels needs 1\.\d\d GiB of"):
        compile_steps(built, config)
    config.memory_gb = 1.5
    compile_steps(built, config)


def test_a_cpu_has_its_share_of_what_the_host_may_use(tmp_path, monkeypatch):
    with open("/proc/meminfo", encoding="utf-8") as file:
        total = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemTotal:"))
    assert compiled.host_memory(()) == total
    limit, unlimited = tmp_path / "memory.max", tmp_path / "unlimited"
    limit.write_text("123456789\n")
    unlimited.write_text("max\n")
    assert compiled.host_memory((str(unlimited), str(tmp_path / "none"))) == total
    assert compiled.host_memory((str(unlimited), str(limit))) == 123456789

    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    config = test_config.load("scenes")
    config.update_from_flattened_dict(SMALL)
    built = experiment.build(config)
    assert compiled._room(built, config) == compiled.host_memory() // len(jax.local_devices())
    monkeypatch.setattr(cluster, "processes_here", lambda: 2)
    assert compiled._room(built, config) == compiled.host_memory() // (2 * len(jax.local_devices()))
    config.memory_gb = 2.0
    assert compiled._room(built, config) == 2 * 2**30
