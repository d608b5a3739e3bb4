import sys

from mlx_unet3d.cli import main

# The command imports the converter by the name that it has when installed; here it is this folder.
sys.modules["mlx_unet3d_convert"] = sys.modules[__package__]
sys.exit(main(["convert", *sys.argv[1:]]))
