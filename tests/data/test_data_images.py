"""Images and labels are read and prepared as the model wants them; other sizes, modes and labels are refused."""

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from distributed_unlearn.config import DataConfig, ModelConfig
from distributed_unlearn.data.classes import Labels, class_names_of
from distributed_unlearn.data.images import load_images
from distributed_unlearn.errors import ConfigError, DataError, ModelError
from distributed_unlearn.models.cnn import TwoLayerCNNConfig
from distributed_unlearn.models.image_processor import ImagePreparation, load_image_preparation

DIGIT_NAMES = tuple("0123456789")
PLAIN = ImagePreparation(num_channels=1, size=(8, 8), processor=None, mean=(0.5,), std=(0.25,))


def digits(split="train", **settings):
    return DataConfig(path="sklearn:digits", format="image", split=split, **settings)


def write_images(folder, images, labels, ids=None):
    """A parquet file with an image column, as `datasets` writes it."""
    columns = {"image": images, "label": labels}
    if ids is not None:
        columns["record_id"] = ids
    features = {"image": datasets.Image()}
    table = datasets.Dataset.from_dict(columns)
    table.cast(datasets.Features({**table.features, **features})).to_parquet(folder / "images.parquet")
    return DataConfig(path=str(folder / "images.parquet"), format="image")


def grey(seed=0, size=(8, 8), mode="L"):
    shape = (*size, len(mode)) if len(mode) > 1 else size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_digits_are_normalised_and_named():
    from sklearn.datasets import load_digits

    values, labels = load_images(digits(), PLAIN, DIGIT_NAMES)
    truth = load_digits()
    assert values.shape == (1797, 1, 8, 8) and values.dtype == np.float32
    expected = (np.round(truth.images * 255 / 16) / 255 - 0.5) / 0.25
    assert np.abs(values[:, 0] - expected).max() < 1e-6
    assert labels.classes.tolist() == truth.target.tolist()
    assert labels.record_ids[0] == "digit-0000" and labels.record_ids[-1] == "digit-1796"
    assert set(labels.subject_ids) == {None}


def test_a_split_keeps_the_ids():
    _, head = load_images(digits("train[:3]"), PLAIN, DIGIT_NAMES)
    _, tail = load_images(digits("train[1795:]"), PLAIN, DIGIT_NAMES)
    assert head.record_ids == ("digit-0000", "digit-0001", "digit-0002")
    assert tail.record_ids == ("digit-1795", "digit-1796")
    assert Labels.join([head, tail]).record_ids == head.record_ids + tail.record_ids
    with pytest.raises(DataError, match="more than one file"):
        Labels.join([head, head])


@pytest.mark.parametrize("split", ["test", "train[", "train[:nine]"])
def test_a_split_that_does_not_exist_is_refused(split):
    with pytest.raises(DataError, match="data.split"):
        load_images(digits(split), PLAIN, DIGIT_NAMES)


def test_an_unknown_source_of_scikit_learn_is_refused():
    with pytest.raises(DataError, match="sklearn:digits"):
        load_images(DataConfig(path="sklearn:faces", format="image"), PLAIN, DIGIT_NAMES)


def test_an_image_column_is_read(tmp_path):
    images = [grey(0), grey(1)]
    values, labels = load_images(write_images(tmp_path, images, [1, 0], ["b", "a"]), PLAIN, ("no", "yes"))
    assert labels.record_ids == ("b", "a") and labels.classes.tolist() == [1, 0]
    assert np.allclose(values[1, 0], (np.asarray(images[1]) / 255 - 0.5) / 0.25, atol=1e-6)


def test_colours_come_first_in_the_models_order(tmp_path):
    image = grey(3, mode="RGB")
    preparation = ImagePreparation(3, None, None, (0.0, 0.0, 0.5), (1.0, 1.0, 2.0))
    values, _ = load_images(write_images(tmp_path, [image], ["cat"]), preparation, ("dog", "cat"))
    pixels = np.asarray(image).astype(np.float64) / 255
    assert np.allclose(values[0, 0], pixels[:, :, 0], atol=1e-6)
    assert np.allclose(values[0, 2], (pixels[:, :, 2] - 0.5) / 2, atol=1e-6)


def test_the_checkpoints_own_processor_resizes(tmp_path):
    ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    preparation = load_image_preparation(ModelConfig(path=str(tmp_path)), TwoLayerCNNConfig(image_size=12))
    values, _ = load_images(digits("train[:300]"), preparation, DIGIT_NAMES)  # more than one call of the processor
    assert values.shape == (300, 1, 12, 12)
    assert -1 <= values.min() < -0.9 and 0.9 < values.max() <= 1


def test_size_and_normalisation_come_from_the_configuration_without_a_processor(tmp_path):
    found = load_image_preparation(ModelConfig(path=str(tmp_path)), TwoLayerCNNConfig(image_size=8, image_std=[0.2]))
    assert found == ImagePreparation(1, (8, 8), None, (0.5,), (0.2,))
    with pytest.raises(ModelError, match="2 image_mean"):
        load_image_preparation(ModelConfig(path=str(tmp_path)), TwoLayerCNNConfig(image_mean=[0.5, 0.5]))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (grey(size=(8, 9)), "8 x 9 pixels in record 'row-1'"),
        (grey(mode="RGB"), "mode RGB in record 'row-1'"),
        (grey(mode="RGBA"), "mode RGBA in record 'row-1'"),
    ],
)
def test_images_of_another_size_or_mode_are_refused(tmp_path, image, complaint):
    with pytest.raises(DataError, match=complaint):
        load_images(write_images(tmp_path, [grey(), image], [0, 1]), PLAIN, ("no", "yes"))


def test_images_of_different_sizes_are_refused_where_nothing_resizes_them(tmp_path):
    anything = ImagePreparation(1, None, None, (0.0,), (1.0,))
    with pytest.raises(DataError, match="9 x 9 pixels"):
        load_images(write_images(tmp_path, [grey(), grey(size=(9, 9))], [0, 1]), anything, ("no", "yes"))
    ViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    left = load_image_preparation(ModelConfig(path=str(tmp_path)), TwoLayerCNNConfig(image_size=8))
    with pytest.raises(DataError, match="different sizes"):
        load_images(write_images(tmp_path, [grey(), grey(size=(9, 9))], [0, 1]), left, ("no", "yes"))
    with pytest.raises(DataError, match="9 x 9 pixels"):
        load_images(write_images(tmp_path, [grey(size=(9, 9))], [0]), left, ("no", "yes"))


@pytest.mark.parametrize("values", [[[0.5, 1]], [[300, 1]], [[-1, 1]], "text", [[1, 2], [3]], [1, 2]])
def test_arrays_that_are_no_images_are_refused(tmp_path, values):
    import json

    (tmp_path / "a.jsonl").write_text(json.dumps({"image": values, "label": 0}) + "\n", encoding="utf-8")
    preparation = ImagePreparation(1, None, None, (0.0,), (1.0,))
    with pytest.raises(DataError, match="row-0"):
        load_images(DataConfig(path=str(tmp_path / "a.jsonl"), format="image"), preparation, ("no", "yes"))


def test_labels_are_names_or_numbers_of_classes(tmp_path):
    images = [grey()] * 3
    for labels, names, expected in (
        ([2, 0, 1], ("a", "b", "c"), [2, 0, 1]),
        (["c", "a", "b"], ("a", "b", "c"), [2, 0, 1]),
        ([3, 1, 2], ("1", "2", "3"), [2, 0, 1]),  # names come first: data that counts from 1
    ):
        found = load_images(write_images(tmp_path, images, labels), PLAIN, names)[1]
        assert found.classes.tolist() == expected


@pytest.mark.parametrize("label", [3, -1, "d", "0.5", "²", None, 1.5, True])
def test_a_label_outside_the_classes_is_refused(tmp_path, label):
    with pytest.raises(DataError, match="record 'row-0'"):
        load_images(write_images(tmp_path, [grey()], [label]), PLAIN, ("a", "b", "c"))


def test_the_text_of_a_label_is_never_shown(tmp_path):
    with pytest.raises(DataError) as caught:
        load_images(write_images(tmp_path, [grey()], ["Ada Lovelace"]), PLAIN, ("a", "b"))
    assert "Ada" not in str(caught.value)


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="more than once"):
        load_images(write_images(tmp_path, [grey(), grey(1)], [0, 1], ["x", "x"]), PLAIN, ("no", "yes"))


def test_class_names_are_the_jobs_or_the_checkpoints():
    config = TwoLayerCNNConfig(id2label={0: "no", 1: "yes"})
    assert class_names_of(config, digits()) == ("no", "yes")
    assert class_names_of(config, digits(label_names=("1", "2"))) == ("1", "2")
    with pytest.raises(ConfigError, match="3 names for a checkpoint of 2 classes"):
        class_names_of(config, digits(label_names=("1", "2", "3")))
