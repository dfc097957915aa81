"""A TORCH_HOME with stand-ins of the published checkpoints, and an environment without a network."""

import torch
from standins import PublishedAnyUp

NAMES = {"anyup": "anyup_paper", "anyup_multi_backbone": "anyup_multi_backbone"}


def torch_home(home):
    """Make the folder `home` a TORCH_HOME that holds both published checkpoints, with random weights: the weights."""
    (home / "hub" / "checkpoints").mkdir(parents=True)
    weights = {}
    for seed, name in enumerate(NAMES.values()):
        torch.manual_seed(seed)
        weights[name] = PublishedAnyUp().state_dict()
        torch.save(weights[name], home / "hub" / "checkpoints" / f"{name}.pth")
    return weights


def offline(environment, home):
    dead = "http://127.0.0.1:9"
    proxies = {name: dead for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    return environment | proxies | {"no_proxy": "", "NO_PROXY": "", "TORCH_HOME": str(home)}
