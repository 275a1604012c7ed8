"""What prepares records travels with a checkpoint."""

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.models.processor import load_tokenizer, save_tokenizer
from tests.engine.checkpoints import word_tokenizer


def test_a_multimodal_checkpoint_keeps_how_its_images_are_prepared(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    word_tokenizer().save_pretrained(source)
    save_tokenizer(str(source), None, target)
    assert not (target / "preprocessor_config.json").exists()
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (source / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}')
    save_tokenizer(str(source), None, target)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (target / name).read_text() == (source / name).read_text()
    assert load_tokenizer(ModelConfig(path=str(target))).get_vocab() == word_tokenizer().get_vocab()
