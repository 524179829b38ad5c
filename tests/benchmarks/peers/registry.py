"""All peers, by name."""

from __future__ import annotations

from tests.benchmarks.peers import aimet, brevitas, modelopt, nncf, torchao


PEERS = {peer.name: peer for peer in (brevitas.PEER, nncf.PEER, modelopt.PEER, aimet.PEER, torchao.PEER)}
