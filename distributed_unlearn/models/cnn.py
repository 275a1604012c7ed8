"""The two-layer convolutional network of Bui et al. (arXiv 2406.14507) as a small Hugging Face model.

Two 3 x 3 convolutions, each with ReLU and 2 x 2 max pooling, then one linear layer: small enough for an explicit
Hessian. `register_own_models` makes transformers' auto classes know it, so that a checkpoint with this `model_type`
opens like any other.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class TwoLayerCNNConfig(PreTrainedConfig):
    """Sizes of a `TwoLayerCNN`, and how its images are prepared where the checkpoint has no image processor.

    Args:
        image_size: Height and width in pixels; a multiple of 4.
        num_channels: 1 for grey images, 3 for RGB.
        first_channels: Output channels of the first convolution.
        second_channels: Output channels of the second convolution.
        image_mean: Subtracted from pixels in [0, 1], one number a channel.
        image_std: Divides what is left, one number a channel.
        kwargs: Those of every configuration: num_labels, id2label, ...
    """

    model_type = "two_layer_cnn"

    image_size: int = 28
    num_channels: int = 1
    first_channels: int = 8
    second_channels: int = 16
    image_mean: tuple[float, ...] | list[float] = (0.5,)
    image_std: tuple[float, ...] | list[float] = (0.5,)


class ConvolutionLayer(nn.Module):
    """3 x 3 convolution that keeps the size, ReLU, then 2 x 2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / 2, W / 2]."""
        return nn.functional.max_pool2d(torch.relu(self.convolution(hidden_states)), 2)


class TwoLayerCNNForImageClassification(PreTrainedModel):
    """Two convolutions and a linear layer."""

    config_class = TwoLayerCNNConfig
    base_model_prefix = "cnn"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["ConvolutionLayer"]

    def __init__(self, config: TwoLayerCNNConfig) -> None:
        super().__init__(config)
        widths = (config.num_channels, config.first_channels, config.second_channels)
        self.layers = nn.ModuleList(ConvolutionLayer(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.classifier = nn.Linear(config.second_channels * (config.image_size // 4) ** 2, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Gaussian weights of variance `2 / fan_in` (He et al. 2015), zero biases."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: object
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, num_labels] of images [B, num_channels, image_size, image_size].

        With `labels` [B] also their mean cross-entropy. Other arguments are those that every model of transformers is
        offered, and have no meaning here.
        """
        del kwargs
        hidden = pixel_values
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.classifier(hidden.flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def register_own_models() -> None:
    """Make transformers' auto classes know the models of this package, in this process; calling it again is fine."""
    AutoConfig.register(TwoLayerCNNConfig.model_type, TwoLayerCNNConfig, exist_ok=True)
    AutoModelForImageClassification.register(TwoLayerCNNConfig, TwoLayerCNNForImageClassification, exist_ok=True)
