"""Positions that gates per text read: the prompt without padding, for every form of attention mask."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from legomole.hosts.transformers.mixing import mixed
from legomole.hosts.transformers.texts import _without_padding

from .tiny_language import (
    MODELS,
    READS,
    WITHOUT_GRADIENTS,
    GateRecorder,
    close,
    gate_settings,
    gate_values,
    generate,
    llama,
    mixture,
    padded,
    prompts,
)

pytestmark = WITHOUT_GRADIENTS


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
    def test_padded_rows_equal_rows_alone(self, kind, reads, side):
        model = MODELS[kind]()
        mix = mixture(model, gate_settings(reads))
        texts = prompts(3, 6)
        inputs = padded(texts, side)
        mask = inputs["attention_mask"]
        if kind != "llama":  # positions are learnt, not relative
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        with mixed(model, mix):
            together = model(**inputs, output_hidden_states=True).hidden_states[-1]
            for row, text in enumerate(texts):
                alone = model(text, output_hidden_states=True).hidden_states[-1]
                assert close(together[row][mask[row].bool()], alone[0])

    @pytest.mark.parametrize("form", ["2-d", "bool", "float", "dict", "none"])
    def test_every_form_of_a_mask(self, form):
        """Texts padded on the left: three tokens of which two are new, in a cache with room for five."""
        tokens = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
        attended = torch.zeros(2, 1, 2, 5, dtype=torch.bool)
        attended[:, 0, 0, :2], attended[:, 0, 1, :3] = tokens[:, :2], tokens
        added = torch.zeros(attended.shape).masked_fill(~attended, torch.finfo(torch.float32).min)
        masks = {"2-d": tokens.long(), "bool": attended, "float": added, "dict": {"full_attention": attended}}
        mask = masks.get(form)
        expected = [[True, True], [True, True]] if form == "none" else tokens[:, 1:].tolist()
        assert _without_padding(mask, 2, 2, 1).tolist() == expected
        if form in ("2-d", "bool", "float"):
            assert _without_padding(mask, 2, 3, 0).tolist() == tokens.tolist()

    def test_embeddings_instead_of_tokens(self):
        model = llama()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, gate_settings("hidden"))):
            expected = generate(model, inputs)
            found = model.generate(
                inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
                attention_mask=inputs["attention_mask"], max_new_tokens=8, min_new_tokens=8, do_sample=False,
            )  # fmt: skip
        assert torch.equal(found, expected)

    def test_labels_mark_the_end_of_the_prompt(self):
        model = llama()
        mix = mixture(model, gate_settings("hidden"))
        inputs = padded(prompts(4, 7), "left")
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        labels[:, :5] = -100  # the prompts have 2 and 5 tokens
        ends = torch.zeros(2, 7, dtype=torch.bool)
        ends[:, :5] = True
        whole = gate_values(model, mix, **inputs)
        with_labels = gate_values(model, mix, **inputs, labels=labels)
        recorder = GateRecorder()
        with mixed(model, mix) as attachment, attachment.watch(recorder), attachment.prompt(ends):
            model(**inputs)
            prompt = recorder.first_pass(attachment)
        for name, value in prompt.items():
            assert close(with_labels[name], value)
            assert not close(with_labels[name], whole[name], 1e-3)

    def test_without_a_prompt_gates_read_the_first_token(self):
        model = llama()
        mix = mixture(model, gate_settings("hidden"))
        inputs = padded(prompts(4, 7), "left")
        found = gate_values(model, mix, **inputs, labels=inputs["input_ids"])
        first_tokens = torch.stack([inputs["input_ids"][0, 3:4], inputs["input_ids"][1, :1]])
        first = gate_values(model, mix, input_ids=first_tokens)
        assert all(close(found[name], value) for name, value in first.items())
