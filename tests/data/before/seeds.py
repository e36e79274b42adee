from configs import action_vae

get_config = action_vae.get_config


def get_hyper(h):
    return h.sweep("seed", [1])
