"""Checkpoints that are not converted, and why."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import deepspeed_jobs as jobs
import pytest
import torch
from deepspeed_jobs import Odd, settings
from ranks import Ranks

DEADLINE = 240.0  # the first run ever compiles DeepSpeed's communication for CPUs


class Stranger:
    """What no checkpoint should hold."""


def damage(rank, root):
    """Checkpoints that must not be converted; two saved at once, for shards to be mixed."""
    jobs.prepare(rank, 2)
    adam = settings(2)
    adam["optimizer"] = {"type": "Adam", "params": {"torch_adam": True, "lr": 0.1}}
    engine = jobs.build(adam)[0]
    jobs.run_steps(engine, rank, 2, range(1))
    engine.save_checkpoint(f"{root}/adam", tag="one")
    engine = jobs.build(settings(2))[0]
    for step in range(2):
        jobs.run_steps(engine, rank, 2, range(1))
        engine.save_checkpoint(root, tag=f"step {step + 1}")
    engine.save_checkpoint(root, tag="stranger", client_state={"it": Stranger()})
    elastic = settings(2, zero={"elastic_checkpoint": True})
    for tag, made in {
        "frozen": (settings(3), Odd()),
        "elastic": (elastic, None),
        "no names": (settings(0, "Adadelta"), None),
    }.items():
        engine = jobs.build(made[0], model=made[1], several=tag == "no names")[0]
        jobs.run_steps(engine, rank, 2, range(1))
        engine.save_checkpoint(root, tag=tag)


def shard(folder, rank):
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def refusals(rank, root):
    """What each conversion raises, and the folders that are left."""
    jobs.prepare(rank, 1)
    from adadelta_dist.strategies.deepspeed_checkpoint import from_torch, load
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed
    from adadelta_dist.strategies.deepspeed_universal import read_universal, write_universal

    root = Path(root)
    entry = {"step": torch.tensor(1.0), "square_avg": torch.ones(2), "acc_delta": torch.ones(2)}
    later = entry | {"step": torch.tensor(2.0)}
    groups = [{"params": [0, 1], "param_names": ["a", "b"], "rho": 0.9}]
    weights = {"a": torch.ones(2), "b": torch.ones(2)}

    def torchs(state, groups=groups, weights=weights):
        return lambda: from_torch(weights, {"state": state, "param_groups": groups})

    def interrupted():
        checkpoint = read_deepspeed(root / "step 1")
        write_universal(replace(checkpoint, read=lambda name, key: 1 / 0), root / "half")

    def existing():
        write_universal(read_deepspeed(root / "step 1"), root / "step 2")

    def universal(name, damage):
        write_universal(read_deepspeed(root / "step 1"), root / name)
        damage(root / name / "zero")
        return lambda: read_universal(root / name)

    def without_groups(zero):
        saved = load(zero / "optimizer_state.pt")
        saved["param_groups"] *= 2  # as DeepSpeed's own tool writes it, which names no parameters
        del saved["adadelta_params"]
        torch.save(saved, zero / "other.pt")  # what was loaded is a view of the file
        (zero / "other.pt").replace(zero / "optimizer_state.pt")

    def pipeline():
        file = root / "pipeline" / "mp_rank_00_model_states.pt"
        torch.save(load(file) | {"module": None}, file.with_name("other"))  # as above
        file.with_name("other").replace(file)
        read_deepspeed(root / "pipeline")

    attempts = {
        "Adam": lambda: read_deepspeed(root / "adam"),
        "no checkpoint": lambda: read_deepspeed(root / "nowhere"),
        "no universal": lambda: read_universal(root / "step 1"),
        "missing": lambda: read_deepspeed(root / "missing"),
        "one too many": lambda: read_deepspeed(root / "one too many"),
        "twice the same": lambda: read_deepspeed(root / "twice the same"),
        "experts": lambda: read_deepspeed(root / "experts"),
        "pipeline": pipeline,
        "a file of universal": universal(
            "u", lambda zero: (zero / "0.bias" / "exp_avg.pt").unlink()
        ),
        "groups of universal": universal("v", without_groups),
        "mixed": lambda: read_deepspeed(root / "mixed"),
        "parallel": lambda: read_deepspeed(root / "parallel"),
        "cut": lambda: read_deepspeed(root / "cut"),
        "stranger": lambda: read_deepspeed(root / "stranger"),
        "frozen": lambda: read_deepspeed(root / "frozen"),
        "elastic": lambda: read_deepspeed(root / "elastic"),
        "no names": lambda: read_deepspeed(root / "no names"),
        "interrupted": interrupted,
        "exists": existing,
        "mixed torch": torchs({0: entry, 1: later}),
        "unnamed": torchs({0: entry}, [{"params": [0, 1], "rho": 0.9}]),
        "unknown": torchs({0: entry}, weights={"a": weights["a"]}),
        "another shape": torchs({0: entry}, weights={"a": torch.ones(3), "b": torch.ones(2)}),
        "Adam's entries": torchs({0: {"step": 1, "exp_avg": entry, "max_exp_avg_sq": entry}}),
    }
    before = sorted(root.rglob("*"))
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors, sorted(root.rglob("*")) == before


BAD = {
    "Adam": r"ValueError: the checkpoint holds the state of another optimizer.*betas",
    "no checkpoint": r"FileNotFoundError: .*nowhere holds no DeepSpeed checkpoint",
    "no universal": r"FileNotFoundError: .*step 1 is no universal checkpoint",
    "missing": r"FileNotFoundError: .*saved by 2 ranks.*those of \[1\] are missing",
    "one too many": r"FileNotFoundError: .*saved by 2 ranks and holds shards of ranks \[0, 1, 2\]$",
    "twice the same": r"ValueError: .*the shards hold \d+ elements of '0.weight', which has 231",
    "experts": r"ValueError: .*experts holds experts or pipeline stages",
    "pipeline": r"ValueError: .*pipeline holds experts or pipeline stages",
    "a file of universal": r"FileNotFoundError: .*0.bias lacks fp32.pt, exp_avg.pt or",
    "groups of universal": r"ValueError: .*has 2 parameter groups, and does not say which",
    "mixed": r"ValueError: mixed steps: .*rank 0 is at step 1, .*rank 1 at 2",
    "parallel": r"ValueError: .*parallel was saved with tensor or pipeline parallelism",
    "cut": r"ValueError: .*zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged",
    "stranger": r"ValueError: .*holds test_deepspeed_refusals.Stranger.*client_state",
    "frozen": r"FileNotFoundError: .*saved by 2 ranks.*those of \[1\] are missing",
    "elastic": r"ValueError: .*saved with elastic_checkpoint",
    "no names": r"ValueError: .*does not say which state is whose: .*had 2 parameter groups",
    "interrupted": r"ZeroDivisionError",
    "exists": r"FileExistsError: .*step 2 exists",
    "mixed torch": r"ValueError: mixed steps: a is at step 1, b at 2",
    "unnamed": r"ValueError: .*does not name its parameters.*named_parameters\(\)",
    "unknown": r"ValueError: the optimizer has 'b', which the model lacks",
    "another shape": r"ValueError: square_avg of 'a' has another shape",
    "Adam's entries": r"ValueError: the state of 'a' holds .*not Adadelta's",
}


@pytest.fixture(scope="module")
def refused(deepspeed_pool, tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")
    deepspeed_pool(2).run(damage, str(root), deadline=DEADLINE)
    damaged = ("missing", "mixed", "parallel", "cut", "one too many", "twice the same")
    for name in (*damaged, "experts", "pipeline"):
        shutil.copytree(root / "step 1", root / name)
    shard(root / "missing", 1).unlink()
    shutil.copy(shard(root / "step 1", 1), shard(root / "one too many", 2))
    shutil.copy(shard(root / "step 1", 0), shard(root / "twice the same", 1))
    (root / "experts" / "layer_0_expert_0_mp_rank_00_model_states.pt").touch()
    (root / "frozen" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    shutil.copy(shard(root / "step 2", 1), shard(root / "mixed", 1))
    model = root / "parallel" / "mp_rank_00_model_states.pt"
    shutil.copy(model, model.with_name("mp_rank_01_model_states.pt"))
    whole = shard(root / "cut", 1).read_bytes()
    shard(root / "cut", 1).write_bytes(whole[: len(whole) // 2])
    return deepspeed_pool(1).run(refusals, str(root), deadline=DEADLINE)[0]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_refused(refused, name):
    errors, _ = refused
    assert re.search(BAD[name], errors[name]), errors[name]


def test_a_conversion_that_failed_leaves_nothing(refused):
    assert refused[1]


def adams_universal(rank, root):
    """Adam's state, made universal by DeepSpeed's own tool, under FusedAdadelta."""
    jobs.prepare(rank, 1)
    from deepspeed.checkpoint.ds_to_universal import main

    from adadelta_dist.strategies.deepspeed_universal import read_universal

    adam = settings(2)
    adam["optimizer"] = {"type": "Adam", "params": {"torch_adam": True, "lr": 0.1}}
    engine = jobs.build(adam)[0]
    jobs.run_steps(engine, rank, 1, range(1))
    engine.save_checkpoint(root, tag="adam")
    inputs = {"input_folder": f"{root}/adam", "output_folder": f"{root}/universal"}
    counts = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    main(Namespace(**inputs, **counts, **flags))
    errors = []
    try:
        read_universal(Path(root, "universal"))
    except ValueError as error:
        errors.append(str(error))
    engine = jobs.build(settings(2, universal=True))[0]
    engine.load_checkpoint(root)
    try:
        jobs.run_steps(engine, rank, 1, range(1))
    except ValueError as error:
        errors.append(str(error))
    return errors


def test_adams_universal_checkpoint_is_refused(deepspeed_pool, tmp_path):
    (read, stepped) = deepspeed_pool(1).run(adams_universal, str(tmp_path), deadline=DEADLINE)[0]
    assert "another optimizer than Adadelta" in read
    assert "holds Adam's state" in stepped


def tensor_parallel(rank, root):
    """What is said of a checkpoint of DeepSpeed's AutoTP, two ranks with half of each matrix."""
    jobs.prepare(rank, 2)
    specs = [(r".*0\.weight$", "column"), (r".*2\.weight$", "row")]
    layers = [{"patterns": [pattern], "partition_type": kind} for pattern, kind in specs]
    rules = {"use_default_specs": False, "layer_specs": layers}
    made = settings(1, tensor_parallel={"autotp_size": 2, "partition_config": rules})
    model = torch.nn.Sequential(torch.nn.Linear(7, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    engine = jobs.build(made, model=torch.nn.ModuleDict({"net": model}))[0]
    engine.save_checkpoint(root, tag="parallel")
    halves = [tuple(p.shape) for p in engine.module.parameters() if p.dim() > 1]
    torch.distributed.barrier()
    if rank:
        return halves, []
    from adadelta_dist.strategies.deepspeed_reading import read_deepspeed

    errors = []
    for other in [None, *sorted(Path(root, "parallel").glob("*mp_rank_01*"))]:
        if other:
            other.unlink()  # what is left must not pass for the whole
        with pytest.raises(ValueError, match="was saved with tensor or pipeline") as caught:
            read_deepspeed(Path(root))
        errors.append(str(caught.value))
    return halves, errors


def test_a_tensor_parallel_checkpoint_is_refused_whole_and_in_part(tmp_path):
    pool = Ranks(2, timeout=120.0)  # its own: AutoTP stays with a process
    try:
        (halves, errors), _ = pool.run(tensor_parallel, str(tmp_path), deadline=DEADLINE)
    finally:
        pool.close()
    assert halves == [(16, 7), (5, 16)]
    assert len(errors) == 3
