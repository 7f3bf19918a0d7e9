# Holdfast: `make` lists the targets. Nothing here needs root, and only `tools`, `lint`, `fmt` and a first
# download of the modules need the module proxy.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The version is the git tag or commit, if there is a git folder to ask.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null)
DATE    := $(shell TZ=UTC0 git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.date=$(DATE)
export GOFLAGS ?= -buildvcs=false

# Knobs: make fuzz FUZZTIME=5m; make e2e E2E_CYCLES=50 E2E_SEED=7; make crash CRASHES=1000; make damage DAMAGES=1000; make soak SOAK=1h; make compare BASE=v0.1.0 BENCH=Append
PKGS       ?= ./...
FUZZTIME   ?= 20s
E2E_CYCLES ?= 5
E2E_SEED   ?=
E2E_RUN    ?= .
E2E_TIMEOUT ?= 20m
CRASHES    ?= 300
CRASH_SEED ?= 0
CRASH_FAULTS ?=
DAMAGES    ?= 10000
DAMAGE_SEED ?= 0
SOAK       ?= 10m
SOAK_SEED  ?= 0
SOAK_FAULTS ?=
BASE       ?= HEAD~1
BENCH      ?= .
COUNT      ?= 10
SIM        ?= --broker mqtt://127.0.0.1:1883 --devices 20 --duration 20s
BENCH_ARGS ?=
LINK_TIME  ?= 10m

.PHONY: help
help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## static binaries into bin/ (CGO_ENABLED=0)
	CGO_ENABLED=0 go build -trimpath -tags timetzdata -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: test
test: ## every test: no network, no root, no service, under two minutes
	go test -timeout 110s $(PKGS)

.PHONY: race
race: ## every test under the race detector
	go test -race -timeout 10m $(PKGS)

.PHONY: lint
lint: bin/tools/golangci-lint ## linters and import arrows (.golangci.yml)
	bin/tools/golangci-lint run $(PKGS)

.PHONY: fmt
fmt: bin/tools/gofumpt bin/tools/goimports ## format every Go file
	git ls-files -z '*.go' | xargs -0r bin/tools/gofumpt -w
	git ls-files -z '*.go' | xargs -0r bin/tools/goimports -local holdfast -w

.PHONY: fmt-check
fmt-check: bin/tools/gofumpt bin/tools/goimports # fails and lists what `make fmt` would change
	@bad=$$(git ls-files -z '*.go' | xargs -0r bin/tools/gofumpt -l; git ls-files -z '*.go' | xargs -0r bin/tools/goimports -local holdfast -l); \
	if [ -n "$$bad" ]; then echo "not formatted (run make fmt):"; sort -u <<<"$$bad"; exit 1; fi

.PHONY: alerts-check
alerts-check: ## Prometheus rules against their cases (configs/alerts_test.yaml); wants promtool, Debian's prometheus
	@command -v promtool >/dev/null || { echo "alerts-check: there is no promtool. It comes with Debian's package prometheus: .ci/run installs it without starting the service."; exit 1; }
	promtool check rules configs/alerts.yaml
	promtool test rules configs/alerts_test.yaml

.PHONY: docs
docs: ## write again what is made from the code: docs/configuration.md and docs/man
	go test -count=1 ./internal/config ./cmd/holdfast -run '^(TestTheConfigurationPage|TestTheManualPages)$$' -update

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME each (20s)
	FUZZTIME=$(FUZZTIME) .ci/fuzz

.PHONY: e2e
e2e: build ## the real binary under kill -9, bad links, hostile clients (E2E_CYCLES=50: the long form)
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast E2E_CYCLES=$(E2E_CYCLES) E2E_SEED=$(E2E_SEED) \
		go test -count=1 -v -parallel 8 -timeout $(E2E_TIMEOUT) -run '$(E2E_RUN)' ./gateway/e2e/

# The long forms of gateway/e2e/storm_test.go and backlog_test.go. 10,000 devices need 10,500 descriptors (ulimit -n), the last one
# root, control groups of version 1 and 12 GB of disk.
.PHONY: storm
storm: build ## 10,000 devices over TLS at once, 500 slow readers, SIGSTOP for 60 s, 5 GB in 128 MiB
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast E2E_STORM=10000 go test -count=1 -v -timeout 20m -run 'TestDevicesComeAllAtOnce' ./gateway/e2e/
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast E2E_STORM=500 E2E_STORM_FOR=60s E2E_STOP=60s E2E_BACKLOG_GB=5 \
		go test -count=1 -v -timeout 30m -run 'TestSubscribersThat|TestConnectStorm|TestGatewayStandsStill|TestBacklogIn|TestPublishersOutrun' ./gateway/e2e/

.PHONY: screenshots
screenshots: build ## the dashboard as a browser shows it, into docs/screenshots (wants Debian's chromium; two minutes)
	@mkdir -p docs/screenshots
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast SCREENSHOTS=$(CURDIR)/docs/screenshots go test -count=1 -run '^TestScreenshots$$' ./gateway/e2e/

.PHONY: crash
crash: build ## CRASHES times each: kill -9, power cut, and power cut in memory; report in dist/crash.json (CRASHES=300 CRASH_SEED=…)
	@mkdir -p dist
	go test -count=1 -v -timeout 60m -run Crash ./spool -crashes=$(CRASHES) -crash-seed=$(CRASH_SEED)
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast CRASHES=$(CRASHES) CRASH_SEED=$(CRASH_SEED) CRASH_FAULTS='$(CRASH_FAULTS)' CRASH_REPORT=$(CURDIR)/dist/crash.json \
		go test -count=1 -v -parallel 4 -timeout 120m -run '^TestCrash$$' ./gateway/e2e/

.PHONY: damage
damage: ## starts from DAMAGES stores damaged by seed (DAMAGES=10000 DAMAGE_SEED=…), half an hour
	go test -count=1 -v -timeout 60m -run 'TestDamagedStores$$' ./gateway -damages=$(DAMAGES) -damage-seed=$(DAMAGE_SEED) | grep -v -e '=== RUN' -e '--- PASS: TestDamagedStores/'
	go test -count=1 -timeout 60m -run 'TestDamagedStoreOpens$$' ./internal/kv -kv-damages=$$(( $(DAMAGES) / 5 ))

.PHONY: soak
soak: build ## everything at once for SOAK: loads, commands, links, disks, kills; report in dist/soak.json (SOAK=10m SOAK_SEED=…)
	@mkdir -p dist
	HOLDFAST_E2E=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast SOAK=$(SOAK) SOAK_SEED=$(SOAK_SEED) SOAK_FAULTS='$(SOAK_FAULTS)' SOAK_REPORT=$(CURDIR)/dist/soak.json \
		go test -count=1 -v -parallel 3 -timeout 24h -run '^TestSoak$$' ./gateway/e2e/

.PHONY: bench
bench: build ## the figures of docs/benchmarks.md with their ratios, in one run (some 11 minutes)
	HOLDFAST_BIN=$(CURDIR)/bin/holdfast go run ./internal/bench $(BENCH_ARGS)

.PHONY: link
link: build ## a link of 50 kbit/s that loses 1 % of the packets, for LINK_TIME (10m); as root also with real packets lost
	HOLDFAST_BIN=$(CURDIR)/bin/holdfast go run ./internal/bench -only 12 -link $(LINK_TIME)

.PHONY: compare
compare: bin/tools/benchstat ## Go benchmarks of BASE (HEAD~1) against the work tree, through benchstat
	BASE=$(BASE) BENCH='$(BENCH)' COUNT=$(COUNT) PKGS='$(PKGS)' .ci/compare

.PHONY: cover
cover: ## test coverage by package and in total
	go test -timeout 10m -coverpkg=./... -coverprofile=coverage.out $(PKGS)
	go tool cover -func=coverage.out | tail -1

.PHONY: sim
sim: build ## simulated devices against a running gateway (SIM="--broker … --devices …")
	bin/firmware-sim $(SIM)

.PHONY: demo
demo: build ## see it work: devices, cuts, a crash, then the ledger
	bin/holdfast demo

.PHONY: tools
tools: bin/tools/golangci-lint bin/tools/gofumpt bin/tools/goimports bin/tools/benchstat ## build the linter and the formatters

.PHONY: deb
deb: bin/tools/nfpm bin/tools/cyclonedx-gomod ## Debian packages for amd64, arm64 and armhf into dist/, the same bytes from the same commit
	.ci/deb

.PHONY: sbom
sbom: build bin/tools/cyclonedx-gomod ## what the binary is made of, in CycloneDX: dist/holdfast.cdx.json
	@mkdir -p dist
	bin/tools/cyclonedx-gomod bin -json -noserial -notimestamp -version $(VERSION) -output dist/holdfast.cdx.json bin/holdfast

.PHONY: container
container: ## a container image of nothing but the binary, holdfast:VERSION (wants podman, buildah or docker)
	VERSION='$(VERSION)' .ci/container

.PHONY: deb-check
deb-check: # the package's scripts, licences and unit, without making it: syntax, all there, validity, exposure of 2.0 at most
	.ci/deb-check

.PHONY: deb-test
deb-test: deb ## install, run, upgrade, remove and purge the package in a clean root (root; debootstrap, systemd-container; a minute or two)
	.ci/deb-test

.PHONY: clean
clean: ## remove what the targets made
	rm -rf bin dist coverage.out

.PHONY: ci
ci: fmt-check lint deb-check alerts-check build test race e2e ## what .ci/run runs

# Tools are built from the module proxy by their own module files, so that their dependencies never meet ours.
bin/tools/golangci-lint: .ci/lint.mod
	CGO_ENABLED=0 go build -modfile=.ci/lint.mod -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

bin/tools/gofumpt bin/tools/goimports bin/tools/benchstat &: .ci/tools.mod
	CGO_ENABLED=0 go build -modfile=.ci/tools.mod -o bin/tools/ mvdan.cc/gofumpt golang.org/x/tools/cmd/goimports golang.org/x/perf/cmd/benchstat

bin/tools/nfpm bin/tools/cyclonedx-gomod &: .ci/packages.mod
	CGO_ENABLED=0 go build -modfile=.ci/packages.mod -o bin/tools/ github.com/goreleaser/nfpm/v2/cmd/nfpm github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
