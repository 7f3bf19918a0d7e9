package audit

import "os"

// WithSync has files synced by fn.
func (o Options) WithSync(fn func(*os.File) error) Options {
	o.sync = fn
	return o
}
