"""What a manifest says of its folder."""

import dataclasses
from pathlib import Path

from osp.data.manifest import Split, content, load_manifest


def test_content_of_an_unfinished_folder_begins_the_content_of_the_finished_one(shards: Path) -> None:
    finished = load_manifest(shards)
    assert len(finished.train.shards) > 3
    assert content(finished)[0] == finished.tokenizer_hash
    assert content(finished)[1] == finished.val.shards[0].sha256
    for num_shards in range(1, len(finished.train.shards)):
        unfinished = dataclasses.replace(finished, train=Split(finished.train.shards[:num_shards]))
        assert content(unfinished) == content(finished)[: 2 + num_shards]
    other = dataclasses.replace(finished, tokenizer_hash="0" * 64)
    assert content(other)[0] != content(finished)[0]
