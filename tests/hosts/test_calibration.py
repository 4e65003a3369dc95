"""Words from files, the cache of statistics, and calibration by merge()."""

from __future__ import annotations

import json
import os
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.merge import statistics_cache
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.hosts.calibration import Prompting, calibrate, concept_words

pytest.importorskip("transformers")

from .transformers import tiny_language as tiny

TEXTS = [["w1 w2 w3", "w4 w5"], ["w6 w7 w8"]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "legomole" / "statistics"


def file_with(**metadata: str) -> Adapter:
    return Adapter({}, metadata={name.replace("__", "."): text for name, text in metadata.items()})


def test_words_of_the_user_go_before_those_of_the_file():
    style = file_with(modelspec__trigger_phrase="ember, fire")
    tags = file_with(ss_tag_frequency='{"a": {"heart": 9, "fire": 8}}')
    assert concept_words([style, tags]) == [["ember"], ["heart"]]  # "fire" names both
    assert concept_words([style, tags], [[], ["bolt", " "]]) == [["ember", "fire"], ["bolt"]]
    assert concept_words([style, file_with()]) == [["ember", "fire"], []]
    with pytest.raises(MergeError, match="its own words"):
        concept_words([style, tags], [["a"]])


def test_merge_calibrates_on_a_model_and_again_from_the_cache(cache: Path):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    passes: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        passes.append(what)

    options = {"base": model, "texts": TEXTS, "tokenizer": tiny.tokenizer(), "progress": progress}
    first = legomole.merge(adapters, rank=2, **options)
    assert "measuring" in passes
    (path,) = cache.iterdir()
    passes.clear()
    again = legomole.merge(adapters, rank=2, **options)
    other = legomole.merge(adapters, "calibrated", weights=[0.5, 2.0], rank=3, **options)
    assert "measuring" not in passes
    assert not [note for note in other.report.notes if "calibrated" in note]
    plain = legomole.merge(adapters, rank=2)
    for name, part in first.adapter.modules.items():
        assert torch.equal(part.A, again.adapter.modules[name].A)
        assert not torch.allclose(part.delta(), plain.adapter.modules[name].delta())
    by_instance = legomole.merge(adapters, Lego(2), **options)
    from_file = legomole.merge(adapters, rank=2, statistics=path)
    for name, part in first.adapter.modules.items():
        assert torch.equal(part.A, by_instance.adapter.modules[name].A)
        assert torch.equal(part.A, from_file.adapter.modules[name].A)


def test_a_sweep_predicts_on_a_model_and_from_a_file(cache: Path):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    options = {"weights": [0.5, 1.0], "rank": 2}
    table = legomole.sweep(adapters, base=model, texts=TEXTS, tokenizer=tiny.tokenizer(), **options)
    (path,) = cache.iterdir()
    assert legomole.sweep(adapters, statistics=path, **options) == table
    assert {candidate.rank for candidate in table.candidates} == {"", "2", "4"}
    plain = next(c for c in table.candidates if (c.method, c.rank, c.strength) == ("calibrated", "2", 1.0))
    result = legomole.merge(adapters, "calibrated", weights=[0.5, 1.0], rank=2, statistics=path)
    predicted = result.report.predicted[-1]
    assert plain.prediction.alone == pytest.approx(predicted.alone, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "neither base nor statistics"), ({"base": "llama"}, "no texts for"), ({"loras": []}, "nothing to merge")],
)
def test_a_sweep_without_statistics_is_refused(options: dict, words: str):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    if "base" in options:
        options = {"base": model, "tokenizer": tiny.tokenizer()}
    with pytest.raises(MergeError, match=words):
        legomole.sweep(options.pop("loras", adapters), **options)


def test_a_method_keeps_its_own_statistics_and_the_recipe_says_so(cache: Path):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    options = {"base": model, "texts": TEXTS, "tokenizer": tiny.tokenizer()}
    measured = legomole.merge(adapters, rank=2, **options)
    (path,) = cache.iterdir()
    own = Statistics.load(path).of(adapters)
    own = Statistics({name: moments for name, moments in own.modules.items() if "q_proj" in name}, own.adapters)
    result = legomole.merge(adapters, Lego(2, statistics=own), **options)
    alone = legomole.merge(adapters, Lego(2, statistics=own))
    assert all(torch.equal(part.A, alone.adapter.modules[name].A) for name, part in result.adapter.modules.items())
    recipes = [json.loads(merged.adapter.metadata["legomole"])["recipe"] for merged in (measured, result)]
    assert [recipe["settings"]["statistics"] == path.name for recipe in recipes] == [True, False]


def test_another_model_text_or_mode_measures_again(cache: Path):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    runs = [
        calibrate(model, adapters, Prompting(texts=TEXTS), tokenizer=tokenizer),
        calibrate(model, adapters, Prompting(texts=[["w1"], ["w2"]]), tokenizer=tokenizer),
        calibrate(model, adapters, Prompting(texts=TEXTS), tokenizer=tokenizer, mode="thorough"),
        calibrate(model, adapters[::-1], Prompting(texts=TEXTS), tokenizer=tokenizer),
        calibrate(tiny.MODELS["tied"](), adapters, Prompting(texts=TEXTS), tokenizer=tokenizer),
    ]
    assert all(run.measured for run in runs)
    assert len(list(cache.iterdir())) == len(runs)
    assert not calibrate(model, adapters, Prompting(texts=TEXTS), tokenizer=tokenizer).measured


def test_without_texts_it_says_so(cache: Path):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]
    result = legomole.merge(adapters, rank=2, base=model)
    assert "not calibrated on the base model: no texts for adapter, adapter" in result.report.notes
    assert not cache.exists()
    off = legomole.merge(adapters, rank=2, base=model, keep_base="off")
    assert not [note for note in off.report.notes if "calibrated" in note]


def test_cancelling_stores_nothing(cache: Path):
    model = tiny.llama()
    adapters = [tiny.lora(model, 1), tiny.lora(model, 2)]

    def cancel(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        legomole.merge(adapters, base=model, texts=TEXTS, tokenizer=tiny.tokenizer(), progress=cancel)
    assert not cache.exists()


def statistics(value: float, d: int = 50) -> Statistics:
    return Statistics({"m": ModuleStatistics(base=value * torch.eye(d))})


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics_cache, "LIMIT", 25_000)  # two files of 10 kB
    for key, age in (("a" * 32, 3000), ("b" * 32, 2000)):
        path = statistics_cache.store_cached(key, statistics(1.0))
        assert path is not None
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert statistics_cache.load_cached("a" * 32) is not None  # now b is the oldest
    assert statistics_cache.store_cached("c" * 32, statistics(1.0)) is not None
    assert sorted(entry.name[0] for entry in cache.iterdir()) == ["a", "c"]
    assert statistics_cache.store_cached("d" * 32, statistics(1.0, 100)) is None  # larger than the limit
    assert statistics_cache.load_cached("d" * 32) is None


def test_a_damaged_file_and_an_unwritable_folder_only_cost_the_cache(cache: Path):
    path = statistics_cache.store_cached("a" * 32, statistics(2.0))
    assert path is not None
    path.write_bytes(b"x")
    assert statistics_cache.load_cached("a" * 32) is None
    assert statistics_cache.find_cached_file("../a.safetensors") is None
    assert statistics_cache.find_cached_file(path.name) == path
    path.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert statistics_cache.store_cached("a" * 32, statistics(2.0)) is None
