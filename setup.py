"Packaging: everything is read from settings.ini, the one place where it is written down."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
oldest = tuple(map(int, cfg["min_python"].split(".")))

# where the package is listed, links into the repository have to be whole ones
readme = Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else cfg["description"]
readme = readme.replace("](nbs/images/", f"]({cfg['git_url']}/raw/{cfg['branch']}/nbs/images/").replace("](nbs/", f"]({cfg['git_url']}/blob/{cfg['branch']}/nbs/")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"]},
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["bundled/*"]},  # trained weights, 200 images, their licence
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ] + [f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest[1], 14)],
    zip_safe=False,
)
