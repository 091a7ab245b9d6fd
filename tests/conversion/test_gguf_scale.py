"""The scale of an rsLoRA adapter survives its conversion: llama.cpp computes what peft computes.

A GGUF adapter has one alpha, which llama.cpp divides by the rank; rsLoRA divides by the square root of it.
"""

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import LlamaForCausalLM

from onecard.conversion import gguf
from onecard.inference import llama_cpp_engine
from tests.support import tiny
from tests.support.adapters import save_adapter

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

IDS, STEPS = list(range(5, 35)), 16
RSLORA = {
    "r": 16,
    "lora_alpha": 24,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 4},  # a square root of its own
}


def test_rslora_in_llama_cpp_is_rslora_in_peft(tiny_model, tiny_gguf, tmp_path):
    folder = save_adapter(tiny_model, tmp_path / "adapter", 3, **RSLORA)
    path = gguf.adapter(folder, tiny_model, tmp_path / "adapter.gguf")
    with torch.no_grad():
        bare = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        without = bare(torch.tensor([IDS])).logits[0]
        model = PeftModel.from_pretrained(bare, folder).eval()
        expected = model(torch.tensor([IDS])).logits[0]
        answer = model.generate(
            input_ids=torch.tensor([IDS]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )[0, len(IDS) :].tolist()
    engine = llama_cpp_engine.Engine(tiny_gguf[0], tiny.tokenizer(), 512, {"rs": path}, threads=1, exact=True)
    active = (("rs", 1.0),)
    scores = torch.cat(list(engine.each(IDS, active)))
    effect, gap = (expected - without).abs().max(), (scores - expected).abs().max()
    assert gap < 1e-3 < 0.5 < effect
    sequence, ids = engine.open(IDS, active), []
    list(sequence.read())
    row = sequence.first()
    while len(ids) < STEPS:
        ids.append(int(row.argmax()))
        row = sequence.advance([0], ids[-1:])
    sequence.close()
    engine.close()
    assert ids == answer
    alpha = GGUFReader(path).get_field("adapter.lora.alpha").contents()
    assert alpha == 0  # llama.cpp then takes B as it is, and B holds the scale
