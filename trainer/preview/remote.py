class Remote3090Backend:
    pass
