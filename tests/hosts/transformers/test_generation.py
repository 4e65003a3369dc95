"""Generation under a mixture, with and without a cache: answers use the gate values of their prompts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from legomole.core.errors import MergeError
from legomole.hosts.transformers.mixing import mixed

from .tiny_language import (
    CACHE,
    CAUSAL,
    MODELS,
    READS,
    WITHOUT_GRADIENTS,
    gate_settings,
    gate_values,
    generate,
    gpt2,
    llama,
    merged,
    mixture,
    padded,
    prompts,
)

pytestmark = WITHOUT_GRADIENTS


class TestGenerate:
    @pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
    @pytest.mark.parametrize("reads", ["hidden", "experts"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_answers_use_the_gates_of_their_prompts(self, kind, reads, granularity):
        """Each row of a padded batch equals generation for it alone with its gate values merged into the weights."""
        model = MODELS[kind]()
        mix = mixture(model, gate_settings(reads, granularity))
        texts = prompts(3, 6)
        expected, values = [], []
        for text in texts:
            gates = gate_values(model, mix, input_ids=text)
            values.append(torch.cat(list(gates.values())))
            expected.append(
                generate(merged(model, mix.experts, {n: g[0] for n, g in gates.items()}), {"input_ids": text})
            )
        with mixed(model, mix):
            found = generate(model, padded(texts, "left"))
            again = generate(model, padded(texts, "left"), use_cache=False)
        assert torch.equal(found, torch.cat(expected))
        assert torch.equal(again, found)
        assert float((values[0] - values[1]).abs().mean()) > 0.05
        assert len({*found.flatten().tolist()}) > 2

    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_equals_repeated_full_passes(self, kind, reads):
        model = MODELS[kind]()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, gate_settings(reads))) as attachment:
            found = generate(model, inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with attachment.prompt(mask.bool()):
                for _ in range(8):
                    positions = (mask.cumsum(1) - 1).clamp_min(0)
                    scores = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
                    ids = torch.cat([ids, scores[:, -1:].argmax(-1)], 1)
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(found, ids[:, 6:])

    @pytest.mark.parametrize("reads", READS)
    def test_beams_and_other_caches(self, reads):
        model = llama()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, gate_settings(reads))):
            expected = generate(model, inputs)
            assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
            beams = generate(model, inputs, num_beams=3)
            assert torch.equal(beams, generate(model, inputs, num_beams=3, use_cache=False))
        assert not torch.equal(beams, expected)

    def test_chunked_prefill_needs_gates_per_token(self):
        model = llama()
        inputs = padded(prompts(6, 6), "left")
        with mixed(model, mixture(model, gate_settings("token"))):
            assert torch.equal(generate(model, inputs, prefill_chunk_size=4), generate(model, inputs))
        with mixed(model, mixture(model, gate_settings("hidden"))):
            with pytest.raises(MergeError, match=r"in chunks[\s\S]*prefill_chunk_size=4"):
                generate(model, inputs, prefill_chunk_size=4)
            config = transformers.GenerationConfig(prefill_chunk_size=2, max_new_tokens=2)
            with pytest.raises(MergeError, match="in chunks"):
                model.generate(**inputs, generation_config=config)

    def test_output_mixing_without_a_cache(self):
        """With the gates held at one expert, every block equals the block under that expert alone."""
        model = llama()
        mix = mixture(model, gate_settings("token", "block"), "output")
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix) as attachment:
            with attachment.hold([1.0, 0.0]):
                found = generate(model, inputs, use_cache=False)
            with pytest.raises(MergeError, match="key-value cache"):
                generate(model, inputs)
            free = generate(model, inputs, use_cache=False)
        assert torch.equal(found, generate(merged(model, mix.experts, (1, 0)), inputs))
        assert not torch.equal(free, found)

    def test_gates_stay_with_the_cache(self):
        """Two conversations, decoded step by step in turn; each keeps the gates of its own prompt."""
        model = llama()
        one, two = prompts(4, 6)
        with mixed(model, mixture(model, gate_settings("hidden"))) as attachment:
            expected = [generate(model, {"input_ids": text}, 3) for text in (one, two)]
            caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
            texts, found = [one, two], [[], []]
            for _ in range(3):
                for i in range(2):
                    scores = model(texts[i], **{CACHE: caches[i]}, use_cache=True).logits
                    texts[i] = scores[:, -1:].argmax(-1)
                    found[i].append(texts[i])
            reader = attachment._gate_values.text_reader
            assert len(reader.cached_gates) == 2
            del caches
            assert len(reader.cached_gates) == 0
        assert [torch.cat(tokens, 1).tolist() for tokens in found] == [tokens.tolist() for tokens in expected]

    def test_a_cache_created_by_the_model_keeps_its_gates(self):
        model = gpt2()
        (text,) = prompts(5)
        with mixed(model, mixture(model, gate_settings("hidden"))):
            expected = generate(model, {"input_ids": text}, 2)
            first = model(text, use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            second = model(token, **{CACHE: first[CACHE]}, use_cache=True).logits[:, -1:].argmax(-1)
        assert torch.equal(torch.cat([token, second], 1), expected)

    def test_caches_started_without_the_mixture_are_refused(self):
        model = llama()
        ids = torch.cat(prompts(5, 5))
        mix = mixture(model, gate_settings("hidden"))
        before = model(ids, use_cache=True)[CACHE]
        with mixed(model, mix):
            with pytest.raises(MergeError, match=r"prompt are unknown[\s\S]*inside the with block"):
                model(ids[:, :1], **{CACHE: before})
            cache = model(ids, use_cache=True)[CACHE]
            cache.batch_select_indices(torch.tensor([0]))
            with pytest.raises(MergeError, match=r"another number of texts[\s\S]*expected: +2[\s\S]*found: +1"):
                model(ids[:1, :1], **{CACHE: cache})
        with mixed(model, mixture(model, gate_settings("token"))):
            model(ids[:, :1], **{CACHE: before})  # gates per token need nothing of the prompt
