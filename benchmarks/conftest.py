def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small sizes: does the suite itself work")
