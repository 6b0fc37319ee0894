"""A run as a model of lm-eval: with every token on full attention what lm-eval's own `hf` makes of the published model,
else what the run itself says; offline."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from configs import smoke
from experiments import lm_eval as command
from experiments import studies
from meta_attention_jax import load_run
from meta_attention_jax.data.tokenizer import ByteTokenizer, SymbolTokenizer
from meta_attention_jax.training.job import prepare
from meta_attention_jax.training.loop import train
from tests import making
from tests.close import assert_close
from tests.making import published
from tests.test_retrofit import config

ROOT = pathlib.Path(__file__).parent.parent
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "oh "},
]
CONTEXT = 96
LONG = "a text of words that goes on for longer than the context of the model, " * 4
PAIRS = [
    ("", "a text"), ("", "<|end|>b"), ("a question: ", "an answer"), ("a question:", " an answer"),
    ("a question:", " another"), (LONG, " a continuation"), ("b<|end|>c", "d"), ("x", LONG[:CONTEXT]),
    ("<|start|>e", "f"), ("caf\u00e9", "\u00e9 \u4e2d"),
]
TEXTS = ["a short text", LONG, LONG[:CONTEXT], LONG[: CONTEXT + 1], "z"]
DRAWN = [
    ("a question:", {"until": ["\n\n", "e"], "max_gen_toks": 40}), ("a", {"max_new_tokens": 40}),
    ("caf\u00e9", {"until": "<|end|>", "max_gen_toks": 9}), ("another", {"until": ["\n\n", "e"], "max_gen_toks": 40}),
    (LONG, {"until": [], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}),
]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No hub, no cache of the user's; before anything of it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        yield patch


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """name -> (published model, run): `plain` has no token that begins a text, `begins` has one."""
    made = {}
    for name in ("plain", "begins"):
        place = tmp_path_factory.mktemp(name)
        folder = published(place / "model", context=CONTEXT)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][258:] = 0  # Of no token: neither may draw them.
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.add_special_tokens([tokenizers.AddedToken("<|start|>", special=True)])
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
        if name == "begins":
            template = tokenizers.processors.TemplateProcessing
            inner.post_processor = template(single="<|start|> $A", special_tokens=[("<|start|>", 257)])
            said["bos_token"] = "<|start|>"
            model = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(model | {"bos_token_id": 257}))
        inner.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        for split in ("train", "validation", "test"):
            (place / "text" / split).mkdir(parents=True)
            (place / "text" / split / "a.txt").write_text(LONG * 3)
        changes = {"train.steps": 1, "train.eval_every": 1, "train.checkpoint_every": 1}
        train(prepare(config(place, **changes), place / "run"), progress=False)
        made[name] = folder, place / "run"
    return made


def requests(kind, rows):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args if isinstance(args, tuple) else (args,), i) for i, args in enumerate(rows)]


def answers(model):
    """What a model says of all of it."""
    return (
        model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS), disable_tqdm=True),
        model.generate_until(requests("generate_until", DRAWN), disable_tqdm=True),
    )


@pytest.mark.lm_eval
@quiet
@pytest.mark.parametrize("name, size", [("plain", 3), ("begins", 3), ("begins", 1)])
def test_with_every_token_on_full_attention_it_is_the_published_model_by_transformers(roots, offline, name, size):
    from lm_eval.models.huggingface import HFLM

    from experiments.studies.harness import RoutedLM

    folder, run = roots[name]
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=size)
    ours = RoutedLM(run, price=-10, mode="hard", batch_size=size)
    assert ours.max_length == theirs.max_length == CONTEXT and ours.prefix_token_id == theirs.prefix_token_id
    (pairs, rolling, drawn), (their_pairs, their_rolling, their_drawn) = answers(ours), answers(theirs)
    assert_close([log for log, _ in pairs], [log for log, _ in their_pairs], 1e-5)
    assert [best for _, best in pairs] == [best for _, best in their_pairs]
    assert_close(rolling, their_rolling, 1e-5)
    assert drawn == their_drawn and any(len(text) > 10 for text in drawn)
    assert ours.get_model_info()["full_attention_share"] == 1.0
    for told in (True, False):
        chats = [model.apply_chat_template(CHAT, add_generation_prompt=told) for model in (ours, theirs)]
        assert chats[0] == chats[1] and ours.tok_encode(chats[0]) == theirs.tok_encode(chats[1])
    assert ours.chat_template(True) == TEMPLATE and ours.chat_template(False) is None


@pytest.mark.lm_eval
@quiet
def test_a_routed_model_answers_what_the_run_itself_says(roots, offline):
    from experiments.studies.harness import RoutedLM

    run = load_run(roots["begins"][1]).fit_budget(cost=0.6, max_batches=1)
    ours = RoutedLM(run.path, budget=0.6, batch_size=2)
    short = [text for text in TEXTS if len(text) < CONTEXT]
    rows = [ours.tok_encode(text) for text in short]
    texts = [[ours.prefix_token_id, *row[:-1]] for row in rows]
    logs = [jax.nn.log_softmax(run.logits(text))[np.arange(len(row)), row] for text, row in zip(texts, rows)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", short), disable_tqdm=True)
    assert_close(found, [log.sum() for log in logs], 1e-5)
    full = np.concatenate([run.routes(text).route == 0 for text in texts], axis=1)
    info = ours.get_model_info()
    assert 0 < full.mean() < 1 and info["full_attention_share"] == pytest.approx(full.mean())
    assert info["run_mode"] == "hard" and info["run_price"] == float(run.hypers.routing.price)
    said = {"until": [], "max_gen_toks": 12}
    asked = requests("generate_until", [(prompt, said) for prompt in ("a text", "other words")])
    drawn = ours.generate_until(asked, disable_tqdm=True)
    assert drawn == [run.generate(request.args[0], steps=12).text.removeprefix(request.args[0]) for request in asked]
    soft = RoutedLM(run.path, mode="soft", batch_size=2)
    soft.loglikelihood_rolling(requests("loglikelihood_rolling", short), disable_tqdm=True)
    assert soft.get_model_info()["full_attention_share"] == 1, "a mixture computes all of its mechanisms"
    blank, none = ours.loglikelihood(requests("loglikelihood", [(" ", "a text"), ("", " a text")]), disable_tqdm=True)
    assert blank == none and blank[0] < -1.0  # Of blanks alone no context is left.


@pytest.mark.lm_eval
@quiet
def test_samples_are_those_of_a_seed_and_a_request_whatever_stands_beside_it(roots, offline):
    from experiments.studies.harness import RoutedLM

    said = {"until": ["q"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.9, "top_k": 0, "num_beams": 1}
    asked = requests("generate_until", [("a text", said)] * 3 + [("another", said)])
    made = {
        (size, seed): RoutedLM(roots["plain"][1], seed=seed, batch_size=size).generate_until(asked, disable_tqdm=True)
        for size, seed in ((4, 0), (1, 0), (4, 1))
    }
    assert made[4, 0] == made[1, 0] != made[4, 1] and len(set(made[4, 0])) > 1


@pytest.mark.lm_eval
@quiet
def test_tokenizers_of_our_own_begin_a_text_behind_a_line(roots, offline):
    from experiments.studies.harness import Mistake, RoutedLM

    ours = RoutedLM(roots["plain"][1], mode="soft")
    ours.run = dataclasses.replace(ours.run, tokenizer=ByteTokenizer())
    assert ours.prefix_token_id == 10 and ours.eot_token_id is None and ours.tok_decode([104, 105, 0xE9]) == "hi\ufffd"
    [found] = ours.loglikelihood_rolling(requests("loglikelihood_rolling", ["hi!"]), disable_tqdm=True)
    logs = jax.nn.log_softmax(ours.run.logits(list(b"\nhi"), mode="soft"))
    assert_close(found, sum(float(logs[i, byte]) for i, byte in enumerate(b"hi!")), 1e-5)
    [drawn] = ours.generate_until(requests("generate_until", [("hi", {"until": ["\n"], "max_gen_toks": 5})]), True)
    assert len(drawn) <= 5
    ours.run = dataclasses.replace(ours.run, tokenizer=SymbolTokenizer(["k1", "v1"]))
    with pytest.raises(Mistake, match="^prefix_token_id: expected an id, where no token begins a text, got None."):
        ours.prefix_token_id  # noqa: B018
    with pytest.raises(Mistake, match="^apply_chat_template: expected a tokenizer with a chat template, got 'symb"):
        ours.chat_template(True)


TASKS = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: ['a', 'of', '.']\n"
                    "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "local_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
                     "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n",
    "local_drawn": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{text}}'\n"
                   "generation_kwargs: {until: ['e'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"text": text, "answer": i % 3} for i, text in enumerate([*TEXTS, "words of a text"])]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, said in TASKS.items():
        data = f"{{data_files: {{test: {folder / 'lines.jsonl'}}}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + said)
    return folder


def commanded(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.lm_eval", *map(str, flags)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )


@pytest.mark.lm_eval
@quiet
def test_the_command_gives_what_lm_eval_s_own_model_gives_for_local_tasks(roots, offline, tasks, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, run = roots["plain"]
    ended = commanded(
        "--model", "meta_attention_jax", "--model_args", f"run={run},price=-10,mode=hard", "--batch_size", 4,
        "--tasks", ",".join(TASKS), "--include_path", tasks, "--output_path", tmp_path / "out.json", "--log_samples",
    )
    assert ended.returncode == 0, ended.stderr
    assert "full attention ran on 100.0 % of the layers" in ended.stderr and "local_choice" in ended.stdout
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["config"]["full_attention_share"] == 1.0 and found["config"]["model"] == "meta_attention_jax"
    theirs = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu", batch_size=4,
        tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)),
    )
    for name in TASKS:
        values = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        assert values and values.keys() <= found["results"][name].keys()
        for key, value in values.items():
            assert found["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)


@pytest.mark.lm_eval
@quiet
@pytest.mark.parametrize("given, sentence", [
    ({"run": None}, "run: expected a run directory, as in --model_args run=FOLDER, got None."),
    ({"run": "nowhere"}, "workdir: expected .*nowhere"),
    ({"budget": 0.9}, r"cost: expected a budget found for the run \(.*--budget_cost=0.9\), got 0.9 at step 1"),
    ({"budget": 0.9, "price": 0.1}, "price: expected none beside a budget, which has its own, got 0.1."),
    ({"share": 0.5, "mode": "soft"}, "mode: expected 'hard' with a budget, got 'soft'."),
    ({"mode": "sharp"}, "mode: expected one of .* got 'sharp'."),
    ({"pretrained": "x"}, "model_args: expected some of run, budget, .* got 'pretrained'"),
    ({"max_length": 97}, "max_length: expected 2 to the model's context of 96, got 97."),
    ({"prefix_token_id": 999}, "prefix_token_id: expected an id of the 258 tokens, got 999."),
    ({"batch_size": "auto"}, "batch_size: expected a number of rows, got 'auto'."),
    ({"step": 7}, "step: expected .* got 7"),
])
def test_a_mistake_is_one_sentence_before_any_work(roots, offline, given, sentence):
    from experiments.studies.harness import Mistake, RoutedLM

    with pytest.raises(Mistake, match=f"^{sentence}") as error:
        RoutedLM(**{"run": roots["plain"][1], **given})
    assert "\n" not in str(error.value)


@pytest.mark.lm_eval
@quiet
@pytest.mark.parametrize("said, sentence", [
    ({"num_beams": 4}, "generation_kwargs: expected some of until, .* got 'num_beams'."),
    ({"max_gen_toks": 96}, "max_gen_toks: expected fewer than max_length = 96, got 96."),
    ({"max_gen_toks": 0}, "max_gen_toks: expected at least 1, got 0."),
    ({"do_sample": True, "temperature": 0.0}, "temperature: expected a finite number of at least"),
])
def test_a_task_that_asks_for_what_there_is_not_is_one_sentence(roots, offline, said, sentence):
    from experiments.studies.harness import Mistake, RoutedLM

    model = RoutedLM(roots["plain"][1])
    with pytest.raises(Mistake, match=f"^{sentence}"):
        model.generate_until(requests("generate_until", [("a", {"max_gen_toks": 4}), ("a", said)]), disable_tqdm=True)
    with pytest.raises(Mistake, match="^continuation: expected 1 to max_length = 96 tokens, got 97."):
        model.loglikelihood(requests("loglikelihood", [("a", LONG[:97])]), disable_tqdm=True)
    assert model.get_model_info()["tokens_read"] == 0


@pytest.mark.lm_eval
@quiet
def test_a_run_that_knows_no_text_is_refused(tmp_path):
    from experiments.studies.harness import Mistake, RoutedLM

    small = smoke.get_config()
    small.update_from_flattened_dict(making.light(steps=1, every=1))
    train(prepare(small, tmp_path / "run"), progress=False)
    with pytest.raises(Mistake, match="^run: expected a run of text, got 'recall'."):
        RoutedLM(tmp_path / "run")


@pytest.mark.lm_eval
def test_a_mistake_of_the_command_is_one_line(roots, offline):
    ended = commanded("--model", "meta_attention_jax", "--model_args", "run=nowhere", "--tasks", "arc_easy")
    assert ended.returncode == 2 and ended.stdout == ""
    assert "Traceback" not in ended.stderr and ended.stderr.splitlines()[-1].startswith("error: workdir: expected")


def test_without_lm_eval_its_extra_is_named(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "experiments.studies.harness", raising=False)
    monkeypatch.delattr(studies, "harness", raising=False)
    monkeypatch.setattr(command, "tolerant_streams", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert capsys.readouterr().err == "error: lm_eval: expected the extra lm_eval (pip install lm_eval), got none.\n"
