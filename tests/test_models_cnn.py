"""The two-layer CNN is a Hugging Face model like any other once it is registered."""

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from distributed_unlearn.models.classifier import ImageClassifier
from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification, register_own_models


def test_auto_classes_open_what_was_saved(tmp_path):
    torch.manual_seed(0)
    model = TwoLayerCNNForImageClassification(TwoLayerCNNConfig(image_size=12, num_channels=3, num_labels=4))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for _ in range(2):
        register_own_models()
    assert AutoConfig.from_pretrained(tmp_path).second_channels == 16
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 12, 12)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits) and model(pixels).logits.shape == (2, 4)


def test_it_computes_two_convolutions_and_a_linear_layer():
    model = TwoLayerCNNForImageClassification(TwoLayerCNNConfig(image_size=8, num_labels=10)).double()
    assert sum(parameter.numel() for parameter in model.parameters()) == 80 + 1168 + 650
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    weights, pixels = dict(model.named_parameters()), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    hidden = pixels
    for layer in ("layers.0", "layers.1"):
        kernel, bias = weights[f"{layer}.convolution.weight"], weights[f"{layer}.convolution.bias"]
        patches = torch.nn.functional.unfold(hidden, 3, padding=1)  # [B, in * 9, H * W]
        found = (kernel.flatten(1) @ patches + bias[:, None]).clamp(min=0)
        size = hidden.shape[-1]
        found = found.view(2, -1, size // 2, 2, size // 2, 2)
        hidden = found.amax(dim=(3, 5))
    expected = hidden.flatten(1) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert torch.allclose(model(pixels).logits, expected, rtol=1e-12)
    labels = torch.tensor([3, 7])
    assert torch.allclose(model(pixels, labels).loss, torch.nn.functional.cross_entropy(expected, labels))


def test_activations_are_counted_as_a_forward_pass_makes_them():
    sizes = ImageClassifier().activation_sizes(TwoLayerCNNConfig(image_size=8, num_labels=10), 2, 8)
    # Two images of 8 x 8: the first layer keeps its input, ReLU's result twice (for ReLU and for pooling), and indices.
    assert sizes.block_graph == 2 * (64 + 2 * 8 * 64 + 8 * 16)
    assert sizes.block_input == 2 * 8 * 16 and sizes.logits == 2 * 10


def test_blocks_of_stages_are_their_layers():
    config = AutoConfig.for_model("resnet", num_channels=1, hidden_sizes=[4, 4], depths=[2, 1], embedding_size=4)
    model = AutoModelForImageClassification.from_config(config)
    names = [name for name, _ in ImageClassifier().blocks(model).members]
    assert names == [f"resnet.encoder.stages.{place}" for place in ("0.layers.0", "0.layers.1", "1.layers.0")]
