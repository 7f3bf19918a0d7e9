// Package spool is Holdfast's durable store-and-forward log: a log per lane, many readers.
package spool
