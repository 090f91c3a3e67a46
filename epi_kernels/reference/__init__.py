"""The definition: step -> stats -> threshold -> mask in plain PyTorch, one small file a stage.

Every other backend must give the bits these functions give. They run on any device and favour
plainness over speed; a refresh works through slices of bounded size, so it allocates nothing that
grows with the parameters.
"""
