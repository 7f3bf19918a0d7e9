package main

import (
	"context"
	"fmt"
	"net/http"
)

var healthCommand = command{
	name: "health", args: "[--config FILE | --address HOST:PORT]",
	summary: "Exit with 0 if a gateway is ready, with 1 if it is not",
	help: `For a container's health check, and for scripts: it asks GET /readyz, which needs no token, and prints what it says.
The gateway is asked at --address, or at http.address of --config, or at 127.0.0.1:8080.`,
	run: showHealth,
}

func showHealth(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlags{}
	fs.StringVar(&api.config, "config", "", "configuration `FILE` of the gateway")
	fs.StringVar(&api.address, "address", "", "`HOST:PORT` of its HTTP API")
	c, _, err := api.asks(p, fs, args, 0, 0)
	if err != nil {
		return err
	}
	if _, err := c.raw(ctx, http.MethodGet, "/readyz", nil); err != nil {
		return err
	}
	fmt.Fprintln(p.stdout, "ready")
	return nil
}
