"""lm-eval's own command (extra `lm_eval`) with one model more, `meta_attention_jax`: a run at a price of its decisions.

python -m experiments.lm_eval --model meta_attention_jax --model_args run=runs/x,budget=0.3 --batch_size 8
    --tasks lambada_openai,arc_easy [--include_path FOLDER --output_path FILE --apply_chat_template ...]

All flags are lm-eval's (--help), which knows no models but its own: hence this command. Of --model_args:
    run=FOLDER                 a run directory, or an export; backbone=FOLDER where its published model is now
    budget=0.3 | share=0.1     at a projected cost, or a share of full attention, that `experiments.evaluate
                               --budget_cost` (or `--budget_share`) has found a price for; mode hard
    price=0.1  mode=hard       lambda of the decisions and how tokens are routed, else the run's own
    step=best                  or any saved step
    max_length=512             tokens the model sees, else its context, else the length as trained; the rest is cut on
                               the left, and rolling windows are of it
    prefix_token_id=0          what stands before the first token that is predicted, else what begins a text for the
                               tokenizer, else what ends one, else a line end
    seed=0                     of samples, where a task asks for a temperature
`config` of the results says what was evaluated, and the share of the token-layers on which full attention ran.
"""

from __future__ import annotations

from experiments import common
from meta_attention_jax.console import tolerant_streams


def main() -> None:
    tolerant_streams()
    try:
        from experiments.studies import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        common.fail("lm_eval: expected the extra lm_eval (pip install lm_eval), got none.")
    common.keep_compiled()
    try:
        harness.command()
    except harness.Mistake as error:
        common.fail(error)


if __name__ == "__main__":
    main()
