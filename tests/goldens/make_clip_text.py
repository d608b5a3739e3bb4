"""Writes tests/goldens/clip_text and clip_text_2: tiny text encoders saved by transformers, and outputs of
them.

Needs torch and transformers. Run from anywhere: python tests/goldens/make_clip_text.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

FOLDER = Path(__file__).parent / "clip_text"
PROJECTED = FOLDER.with_name("clip_text_2")


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "embedding" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_act="gelu",
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=0,
    )
    model = randomize(CLIPTextModel(config))
    model.save_pretrained(FOLDER)

    ids = torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        outputs = {f"skip.{k}": model.final_layer_norm(states[-(k + 1)]) for k in range(3)}
    data = {"ids": ids.int()} | outputs
    save_file({k: v.contiguous() for k, v in data.items()}, FOLDER / "cases.safetensors")

    config.projection_dim = 6
    config.num_hidden_layers = 2
    model = randomize(CLIPTextModelWithProjection(config))
    model.save_pretrained(PROJECTED)
    ids = torch.randint(0, 38, (3, 12))
    ids[0, 4:], ids[1, 9] = 39, 39  # the third never ends
    data = {"ids": ids.int()}
    for eos in (39, 2):
        model.eos_token_id = model.text_model.eos_token_id = eos
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        data[f"embeds.{eos}"] = output.text_embeds
    data |= {f"states.{k}": state for k, state in enumerate(output.hidden_states)}
    save_file({k: v.contiguous() for k, v in data.items()}, PROJECTED / "cases.safetensors")


if __name__ == "__main__":
    main()
