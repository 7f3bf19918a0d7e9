// Package e2e holds no code, only tests: the real binary among simulated devices, a real upstream broker and a
// proxy between them that breaks the link, killed with SIGKILL in between. What devices were promised is held against
// what arrived upstream.
//
// They need seconds and mosquitto, so plain `go test` skips them; `make e2e` runs them. E2E_CYCLES is how often the
// gateway is killed, E2E_SEED replays a run.
package e2e
