import pytest

from deploy_pipeline.detect import detect, site_root
from deploy_pipeline.errors import NotDeployable
from deploy_pipeline.project_settings import Kind

FLASK = "from flask import Flask\napp = Flask(__name__)\n"
FASTAPI = "import fastapi\nservice: fastapi.FastAPI = fastapi.FastAPI()\n"


def files(tmp_path, contents):
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("contents", "kind"),
    [
        (["Dockerfile", "Procfile", "index.html", "requirements.txt", "main.py"], Kind.DOCKERFILE),
        (["index.html", "requirements.txt", "main.py"], Kind.STATIC),
        (["index.html", "style.css"], Kind.STATIC),
        (["public/index.html"], Kind.STATIC),
        (["dist/index.html"], Kind.STATIC),
        (["build/index.html", "notes.txt"], Kind.STATIC),
        (["requirements.txt", "main.py"], Kind.PYTHON),
        (["requirements.txt", "server.py", "templates/index.html"], Kind.PYTHON),
        (["main.py"], Kind.PYTHON),
        (["server.js"], Kind.NODE),
    ],
)
def test_the_kind_follows_the_documented_order(tmp_path, contents, kind):
    assert detect(files(tmp_path, dict.fromkeys(contents, ""))).kind is kind


def test_a_procfiles_web_line_is_the_start_command_and_its_dependencies_are_installed(tmp_path):
    plan = detect(files(tmp_path, {"Procfile": "worker: x\nweb: python run.py $PORT\n", "requirements.txt": "flask"}))
    assert plan.kind is Kind.PROCFILE
    assert plan.start == ("/bin/sh", "-c", "python run.py $PORT")
    assert plan.build[0][-2:] == ("-r", "requirements.txt")
    assert plan.venv


def test_a_procfile_without_web_is_refused(tmp_path):
    with pytest.raises(NotDeployable, match="web:"):
        detect(files(tmp_path, {"Procfile": "worker: x\n"}))


def test_a_flask_application_is_served_by_gunicorn(tmp_path):
    plan = detect(files(tmp_path, {"app.py": FLASK, "requirements.txt": "flask"}))
    assert plan.start_at("127.0.0.1", 81)[:4] == ("gunicorn", "app:app", "--bind", "127.0.0.1:81")
    assert plan.build[0][-3:] == ("-r", "requirements.txt", "gunicorn")


def test_a_fastapi_application_is_served_by_uvicorn(tmp_path):
    plan = detect(files(tmp_path, {"app/main.py": FASTAPI, "requirements.txt": "fastapi"}))
    assert plan.start_at("::", 81) == ("uvicorn", "app.main:service", "--host", "::", "--port", "81")
    assert plan.build[0][-1] == "uvicorn"


def test_a_framework_that_no_list_names_is_installed(tmp_path):
    plan = detect(files(tmp_path, {"app.py": FLASK}))
    assert plan.build[0][-2:] == ("flask", "gunicorn")


def test_a_pyproject_without_a_build_system_gives_its_dependencies(tmp_path):
    toml = '[project]\nname = "x"\nversion = "1"\ndependencies = ["flask>=3", "--index-url=http://evil"]\n'
    plan = detect(files(tmp_path, {"app.py": FLASK, "pyproject.toml": toml}))
    assert plan.build[0][-2:] == ("flask>=3", "gunicorn")
    assert "--index-url=http://evil" not in plan.build[0]


def test_a_django_project_is_found_in_its_package(tmp_path):
    wsgi = "from django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n"
    plan = detect(files(tmp_path, {"manage.py": "", "shop/wsgi.py": wsgi, "requirements.txt": "django"}))
    assert plan.start[1] == "shop.wsgi:application"


def test_an_application_factory_is_called(tmp_path):
    source = "from flask import Flask\ndef create_app():\n    return Flask(__name__)\n"
    assert detect(files(tmp_path, {"app.py": source})).start[1] == "app:create_app()"


def test_a_plain_script_is_run(tmp_path):
    plan = detect(files(tmp_path, {"main.py": "print(1)", "requirements.txt": ""}))
    assert plan.start == ("python", "main.py")


def test_an_application_made_under_the_main_guard_is_no_import_target(tmp_path):
    source = "import flask\nif __name__ == '__main__':\n    app = flask.Flask('x')\n    app.run()\n"
    assert detect(files(tmp_path, {"main.py": source})).start == ("python", "main.py")


def test_a_page_beside_a_server_belongs_to_the_server_whose_source_is_not_published(tmp_path):
    flask = files(tmp_path / "flask", {"index.html": "", "app.py": FLASK, "requirements.txt": "flask"})
    express = files(tmp_path / "express", {"public/index.html": "", "package.json": '{"scripts": {"start": "node x"}}'})
    vite = files(tmp_path / "vite", {"index.html": "", "package.json": '{"scripts": {"build": "vite build"}}'})
    assert detect(flask).kind is Kind.PYTHON
    assert detect(express).kind is Kind.NODE
    assert detect(vite).build == (("npm", "install"), ("npm", "run", "build"))


def test_a_lock_file_is_respected_and_the_build_script_run(tmp_path):
    manifest = '{"scripts": {"build": "tsc", "start": "node dist/x.js"}}'
    plan = detect(files(tmp_path, {"package.json": manifest, "package-lock.json": "{}"}))
    assert plan.build == (("npm", "ci"), ("npm", "run", "build"))
    assert plan.start == ("npm", "start")


def test_a_package_that_only_builds_is_a_site_in_the_folder_it_builds(tmp_path):
    folder = files(tmp_path, {"package.json": '{"scripts": {"build": "vite build"}}'})
    plan = detect(folder)
    with pytest.raises(NotDeployable, match=r"index\.html"):
        site_root(folder, plan)
    files(folder, {"dist/index.html": ""})
    assert site_root(folder, plan) == folder / "dist"


def test_the_main_file_of_a_package_is_run_but_not_one_outside(tmp_path):
    files(tmp_path, {"outside.js": ""})
    folder = files(tmp_path / "p", {"package.json": '{"main": "../outside.js"}', "server.js": ""})
    assert detect(folder).start == ("node", "./server.js")


def test_deploy_toml_overrules_what_is_found(tmp_path):
    toml = 'kind = "static"\nroot = "site"\nbuild = "make site"\n'
    plan = detect(files(tmp_path, {"deploy.toml": toml, "index.html": "", "app.py": FLASK}))
    assert (plan.kind, plan.roots, plan.build) == (Kind.STATIC, ("site",), (("/bin/sh", "-c", "make site"),))


def test_a_start_line_is_enough(tmp_path):
    plan = detect(files(tmp_path, {"deploy.toml": 'start = "./run"\nhealth_path = "/up"', "run": ""}))
    assert (plan.start, plan.health_path) == (("/bin/sh", "-c", "./run"), "/up")


def test_a_start_line_beside_a_page_starts_a_program_instead_of_publishing_the_folder(tmp_path):
    plan = detect(files(tmp_path, {"deploy.toml": 'start = "./serve"', "index.html": "", "serve": ""}))
    assert (plan.kind, plan.start) == (Kind.PROCFILE, ("/bin/sh", "-c", "./serve"))


def test_port_and_variables_are_taken_from_deploy_toml(tmp_path):
    toml = 'port = 3000\nenv = {GREETING = "hi $HOME"}\n'
    plan = detect(files(tmp_path, {"deploy.toml": toml, "Dockerfile": ""}))
    assert (plan.kind, plan.port, plan.env) == (Kind.DOCKERFILE, 3000, {"GREETING": "hi $HOME"})


def test_an_app_json_is_read_without_what_belongs_to_others(tmp_path):
    env = '{"A": "1", "B": {"value": "2"}, "C": {"required": true}}'
    manifest = f'{{"name": "x", "scripts": {{}}, "start": "./run", "env": {env}}}'
    plan = detect(files(tmp_path, {"app.json": manifest}))
    assert (plan.start[-1], plan.env) == ("./run", {"A": "1", "B": "2"})


def test_deploy_toml_goes_before_app_json(tmp_path):
    assert detect(files(tmp_path, {"app.json": '{"start": "a"}', "deploy.toml": 'start = "b"'})).start[-1] == "b"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("deploy.toml", "kind = 3", "deploy.toml: kind: "),
        ("deploy.toml", 'kind = "php"', "deploy.toml: kind: "),
        ("deploy.toml", "kind = ", "not valid TOML"),
        ("deploy.toml", 'strat = "x"', "deploy.toml: strat: is no setting; known are"),
        ("deploy.toml", 'start = "x"\nhealth_path = "up"', "health_path"),
        ("deploy.toml", 'port = "80"', "deploy.toml: port: "),
        ("deploy.toml", "port = 65536", "deploy.toml: port: "),
        ("deploy.toml", 'env = {PORT = "1"}', "deploy.toml: env: PORT is set by the platform"),
        ("deploy.toml", "env = {A = 1}", r"deploy.toml: env\.A: "),
        ("deploy.toml", 'env = {"A B" = "1"}', "deploy.toml: env: 'A B' is no name"),
        ("deploy.toml", 'kind = "static"\nroot = "../x"', "deploy.toml: root: has to be a folder inside"),
        ("deploy.toml", 'kind = "static"\nstart = "x"', "deploy.toml: start: a static site starts nothing"),
        ("deploy.toml", 'kind = "dockerfile"\nbuild = "x"', "deploy.toml: build: "),
        ("deploy.toml", 'kind = "dockerfile"\nstart = "x"', "does not look like it"),
        ("app.json", '{"start": ["x"]}', "app.json: start: "),
        ("package.json", "{", "not valid JSON"),
        ("package.json", "[]", "not a JSON object"),
        ("package.json", "[" * 100_000, "not valid JSON"),
        ("notes.txt", "", "Found: notes.txt"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(tmp_path, name, content, match):
    with pytest.raises(NotDeployable, match=match):
        detect(files(tmp_path, {name: content}))


def test_an_empty_workspace_is_called_empty(tmp_path):
    with pytest.raises(NotDeployable, match="empty"):
        detect(tmp_path)


@pytest.mark.parametrize("source", ["def (", "\0", "(" * 5000, "a" * 3_000_000, "\xff"])
def test_hostile_python_is_not_followed_into_a_crash(tmp_path, source):
    (tmp_path / "main.py").write_text(source)
    assert detect(tmp_path).start == ("python", "main.py")


def test_a_site_root_that_is_a_link_out_is_refused(tmp_path):
    files(tmp_path / "out", {"index.html": ""})
    folder = files(tmp_path / "p", {"deploy.toml": 'kind = "static"\nroot = "site"', "index.html": ""})
    (folder / "site").symlink_to("../out")
    with pytest.raises(NotDeployable):
        site_root(folder, detect(folder))
