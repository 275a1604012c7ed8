"""The model on ZeRO shards: the only importer of deepspeed and torch.distributed."""
