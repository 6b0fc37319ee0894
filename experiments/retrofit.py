"""Routes a published model: trains its controllers, the model itself frozen, in two stages.

python -m experiments.retrofit --config=configs/retrofit_smollm2.py --workdir=runs/smollm2

local         every layer's own output: how far it is from that of full attention, against the KL; minutes
end_to_end    the text (or the model without routes, retrofit.loss=kl) through all layers, from the local stage

Each is an ordinary run, `local/` and `end_to_end/` of the directory. Interrupted, start it again. The second is what
`load_run`, `experiments.evaluate`, `experiments.generate` and the notebooks open; with --prices `experiments.evaluate`
has its curve of nats against share.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import common
from experiments.studies import final
from meta_attention_jax import analysis
from meta_attention_jax.data.tasks import KINDS
from meta_attention_jax.fields import expect
from meta_attention_jax.files import Place, at
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import Diverged, train
from meta_attention_jax.training.processes import Busy

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with retrofit.backbone.", lock_config=True)
WORKDIR = common.define_path("workdir", None, "Where both stages go.", buckets=True)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 32, "Of the test split, at the end; 0 leaves it unread.", 0)
flags.mark_flags_as_required(["config", "workdir"])
STAGES = ("local", "end_to_end")


def stage_of(config: ConfigDict, stage: str, root: Place) -> ConfigDict:
    """The config of one stage of a retrofit."""
    own = config.copy_and_resolve_references()
    own.retrofit.stage = stage
    if stage == "local":
        own.train.steps = own.train.eval_every = own.train.checkpoint_every = config.retrofit.local_steps
        own.optimizer.learning_rate = config.retrofit.local_learning_rate
        own.objective.beta = config.retrofit.local_beta
        own.train.packed, own.retrofit.loss, own.retrofit.lora_rank = False, "nll", 0
    elif config.retrofit.local_steps:
        own.train.init_from = str(root / "local")
    return own


def main() -> None:
    config, root = CONFIG.value, at(WORKDIR.value)
    with common.user_mistakes():
        expect(config.retrofit.backbone, "retrofit.backbone", "a published model", "")
        expect("full" in config.model.mechanisms, "model.mechanisms", "full attention among them",
               tuple(config.model.mechanisms))
        expect(not config.train.init_from, "train.init_from", "none, for the local stage is", config.train.init_from)
    for stage in STAGES[not config.retrofit.local_steps:]:
        with common.user_mistakes():
            job = prepare(stage_of(config, stage, root), root / stage)
        try:
            train(job, label=f"{config.name} {stage}", final=final.of_run)
        except (Busy, Diverged) as error:
            common.fail(error)
        del job
    if TEST_BATCHES.value:
        with common.user_mistakes():
            run = load_run(root / STAGES[-1], backbone=config.retrofit.backbone)
        print(table(run, TEST_BATCHES.value))


def table(run: Run, batches: int) -> str:
    """Nats and share of full attention by kind of token, on the test split, hard."""
    found = run.evaluate("test", mode="hard", max_batches=batches)
    full = run.mechanisms.index("full")
    kinds = found.get("kinds") or {"tokens": [found["tokens"]], "nll": [found["nll"]], "fractions": []}
    rows = [
        {
            "kind": KINDS[i] if len(kinds["tokens"]) > 1 else "text",
            "tokens": kinds["tokens"][i],
            "nll": kinds["nll"][i],
            "exact": kinds["exact"][i] if len(kinds["tokens"]) > 1 else None,
            "full": sum(layer[i][full] for layer in kinds["fractions"]) / len(kinds["fractions"])
            if kinds["fractions"] else found[f"fraction/{run.mechanisms[full]}"],
        }
        for i in range(len(kinds["tokens"]))
    ]
    columns = [
        analysis.Column("kind", "kind"), analysis.Column("tokens", "tokens", ",.0f"),
        analysis.Column("nll", "nats", ".4f"), analysis.Column("full", "on full", ".1%"),
        analysis.Column("exact", "exact", ".1%"),
    ]
    return f"{run.path} at step {run.step}, test split, hard\n{analysis.terminal_table(rows, columns)}"


if __name__ == "__main__":
    common.run(main)
