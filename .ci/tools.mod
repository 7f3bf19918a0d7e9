// Formatters and the benchmark comparer, apart from the module so that their dependencies never meet ours.
// Used with: go build -modfile=.ci/tools.mod
module holdfast

go 1.26.0

tool (
	golang.org/x/perf/cmd/benchstat
	golang.org/x/tools/cmd/goimports
	mvdan.cc/gofumpt
)

require (
	golang.org/x/tools v0.52.0
	mvdan.cc/gofumpt v0.12.0
)

require (
	github.com/aclements/go-moremath v0.0.0-20210112150236-f10218a38794 // indirect
	golang.org/x/mod v0.42.0 // indirect
	golang.org/x/perf v0.0.0-20260908200009-22c9c6c9d4da // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
	golang.org/x/telemetry v0.0.0-20261009151841-97e8ea77aa2a // indirect
)
