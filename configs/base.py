"""Every field of an experiment, with its default. The other files here change what they need.

A field is set from the command line as `--config.<section>.<field>=<value>`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="base",
            seed=0,
            data=dict(
                # sotu | recall | stdlib | path:FILE_OR_FOLDER | hf:NAME[/CONFIG]
                corpus="sotu",
                # of path: auto (names such as train and test, else a hash) | names | hash
                split="auto",
                tokenizer="bytes",  # bytes | bpe; `recall` has symbols of its own
                vocab_size=4096,  # of a trained bpe
                sequence_length=256,
                batch_size=16,
                seed=-1,  # of the order of the training data; -1: the run's seed
                # recall only: keys and values that exist, bindings per sequence, ...
                num_keys=16,
                num_values=16,
                num_pairs=8,
                min_distance=0,  # from a binding to a query, in tokens; 0 = the window
                query_rate=0.25,
                # ... and symbols to be counted (0 or at least 2), with their rates; see data/recall.py
                num_marks=0,
                mark_rate=0.0,
                mark_bias=0.5,
                aggregate_rate=0.0,
            ),
            model=dict(
                model_dim=128,
                num_layers=2,
                num_heads=4,
                num_kv_heads=4,  # divides num_heads
                mlp_dim=0,  # 0: 8/3 of model_dim, rounded up to a multiple of 32
                mechanisms=("full", "linear", "local"),
                window=32,  # of the local mechanism, the token itself included
                implementation="auto",  # of full attention: auto | xla | blockwise | cudnn
                dtype="float32",  # of the computation: float32 | bfloat16
                scan_layers=False,
                remat=False,
            ),
            controller=dict(
                # bayesian | bayesian_mean (no sampling) | softmax (prior-free) | softmax_kl |
                # cost_penalty | switch (load balance) | gumbel (hard samples) | fixed
                name="bayesian",
                hidden=64,
                posterior="mean_strength",  # mean_strength | additive
                uncertainty="entropy",  # entropy | mutual_information | vacuity
                fixed=("full",),  # mechanisms of the layers, repeated, when name = fixed
                entropy_bonus=0.1,  # rho of cost_penalty: cost per nat of routing entropy
                temperature=0.5,  # of gumbel once the gate has ended; falls geometrically from ...
                temperature_start=2.0,  # ... this
            ),
            prior=dict(
                family="cost_aware",  # cost_aware | uniform
                strength=2.0,  # kappa: pseudo-counts in all
                preference=0.1,  # eta: preference floor
                # nominal | analytic | measured (timed once, frozen in the run directory), or one
                # number per mechanism separated by commas
                costs="nominal",
            ),
            objective=dict(
                beta=0.01,  # weight of the KL, per nat
                beta_warmup=0.2,  # share of the steps over which beta rises from 0
            ),
            gate=dict(
                kind="linear",  # none | linear | cosine | settled
                start=0.4,  # share of the steps at which tokens begin to harden
                end=0.8,  # ... and at which the threshold is reached
                threshold=1.0,  # final theta; 1 makes every token hard
            ),
            optimizer=dict(
                name="adamw",  # adamw | sgd
                learning_rate=3e-3,
                warmup=0.05,  # share of the steps
                final_fraction=0.1,  # of the peak, at the end of the cosine
                weight_decay=0.1,
                clip=1.0,  # global norm; 0 = off
                accumulate=1,  # micro-batches per device and step
            ),
            train=dict(
                steps=1000,
                init_from="",  # run directory whose newest parameters to start from; "" = at random
                log_every=20,
                eval_every=200,
                eval_batches=16,
                checkpoint_every=500,
                keep_latest=2,
                # Packed dispatch once the gate is fully hard: cheaper steps, and a frozen controller ...
                packed=False,
                packed_dense_rows=0.0,  # ... unless this share of the rows runs all mechanisms
                profile_step=-1,  # first of 3 steps traced into <workdir>/profile; -1 = off
            ),
            parallel=dict(
                mode="jit",  # jit (mesh) | pmap
                devices=0,  # 0 = all
                fsdp=1,  # devices that share one copy of parameters and moments; divides model_dim
            ),
        )
    )
